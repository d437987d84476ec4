"""A comparison for people and programs: a table, and what follows from it in words."""

import json
from typing import Any

import pandas as pd

from pcam_kaggle.scoring.compare import Comparison, Entry
from pcam_kaggle.scoring.metrics import Difference, Unit, interval_text

PLURALS: dict[Unit, str] = {"patch": "patches", "slide": "slides", "stain group": "stain groups"}
LEVEL = 0.05
# Two-sided 5 % and 80 % power: how many standard errors a difference must be wide to be found four times in five.
FOUND = 1.96 + 0.84


def words(entry: Entry, base: Entry) -> str:
    """Return in a sentence what follows from the pooled difference of `entry` to `base`, and the unit of its interval and p."""
    if entry.pooled is None:
        return f"{entry.name}: {entry.problem or entry.apart}."
    made, unit = entry.pooled, f"unit: {entry.pooled.unit}"
    if entry.corrected is None:
        return f"{entry.name} against {base.name}: {made.value:+.4f}, interval and p n/a ({made.undefined}; {unit})."
    if entry.corrected < LEVEL and made.low * made.high > 0:
        better, worse = (entry, base) if made.value > 0 else (base, entry)
        ends = sorted([abs(made.low), abs(made.high)])
        span = f"{abs(made.value):.4f} [{ends[0]:.4f}, {ends[1]:.4f}]"
        return f"{better.name} is better than {worse.name} by {span}, {_chance(entry.corrected)} ({unit})."
    signed = f"{made.value:+.4f} {_ends(made)}, {_chance(entry.corrected)}; {unit}"
    sentence = f"{entry.name} against {base.name}: no difference that this data can show ({signed})"
    if not made.value:
        return f"{sentence}."
    needed = made.units * (FOUND * made.error / abs(made.value)) ** 2
    more = max(0, round(needed - made.units, 1 - len(str(round(needed)))))
    return f"{sentence}; were it real, about {more:,.0f} more {PLURALS[made.unit]} would show it four times in five."


def caption(comparison: Comparison) -> str:
    """Return what differences, their intervals and p are computed from, and by which test."""
    unit, base = comparison.unit, comparison.base
    test = "DeLong's paired test" if comparison.slides is None else f"a bootstrap that draws whole {PLURALS[unit]}"
    text = f"Unit of differences, their 95 % intervals and p: {unit}, by {test}; p is corrected for the number of runs (Holm)."
    if comparison.slides is not None and base.oof is not None:
        lacking = int((~base.oof["id"].isin(comparison.slides["id"])).sum())
        text += f" {lacking:,} patches that the map lacks are a {unit} each." if lacking else ""
    return text


def verdicts(comparison: Comparison) -> list[str]:
    """Return a sentence for every run but the baseline, and one for every two that differ in how their folds are grouped."""
    others = [words(entry, comparison.base) for entry in comparison.entries if entry is not comparison.base]
    return [*others, *side_by_side(comparison.entries)]


def side_by_side(entries: list[Entry]) -> list[str]:
    """Return a sentence for every run on folds by label beside the same config on folds by slide or by stain."""
    rest = {entry.name: {key: value for key, value in entry.config.items() if key != "groups"} for entry in entries}
    by_label, grouped = ([], [])
    for entry in (entry for entry in entries if entry.scheme and not entry.problem):
        (by_label if entry.scheme.startswith("stratified") else grouped).append(entry)
    pairs = [(plain, apart) for plain in by_label for apart in grouped if rest[plain.name] == rest[apart.name]]
    return [
        f"{plain.name} has {plain.metrics['pooled']['value']:.4f} on {plain.scheme}, {apart.name} with the same config "
        f"{apart.metrics['pooled']['value']:.4f} on {apart.scheme}: {_fall(plain, apart):+.4f} where look-alikes share a fold."
        for plain, apart in pairs
    ]


def table(comparison: Comparison) -> pd.DataFrame:
    """Return one row per entry, best first: AUC per fold, mean, SD, pooled, ranked, differences, costs, and what differs.

    `interval_unit` is what the pooled and the ranked interval resample, `unit` what the differences do. What is undefined is
    NaN; columns whose names begin with `undefined` say why, and are there only where something is. Entries that can't be
    scored come last, with the reason in `note`. The columns between `differs` and `note` are the config's fields that are not
    the same everywhere.
    """
    entries, base = comparison.entries, comparison.base
    keys = differing([entry.config for entry in entries if entry.config])
    rows = []
    for entry in sorted(entries, key=lambda entry: (bool(entry.problem), -entry.metrics.get("pooled", {}).get("value", 0))):
        row: dict[str, Any] = {"run": entry.name}
        if not entry.problem:
            metrics = entry.metrics
            row |= {f"fold_{k}": value for k, value in enumerate(metrics["fold_auc"])}
            row |= {"mean": metrics["mean"], "sd": metrics["sd"]}
            for kind in ("pooled", "ranked"):
                row |= {
                    kind: metrics[kind]["value"],
                    f"{kind}_low": metrics[kind]["low"],
                    f"{kind}_high": metrics[kind]["high"],
                }
                row |= _reason(kind, metrics[kind].get("undefined", ""))
            # Before intervals named their unit they were DeLong's.
            row["interval_unit"] = metrics["pooled"].get("unit", "patch")
        if entry.pooled:
            row |= _difference("difference", entry.pooled) | {"p": entry.corrected}
            for k, fold in enumerate(entry.folds):
                row |= _difference(f"difference_{k}", fold) | {f"p_{k}": fold.p}
        if entry.pooled or entry is base:
            row["unit"] = comparison.unit
        row |= entry.costs | {"differs": len(keys)} | {key: entry.config.get(key) for key in keys}
        row["note"] = entry.problem or entry.apart or ("the baseline" if entry is base else "")
        rows.append(row)
    every = dict.fromkeys(column for row in rows for column in row)
    ends = ["differs", *keys, "note"]
    return pd.DataFrame(rows, columns=[*(column for column in every if column not in ends), *ends])


def differing(configs: list[dict[str, Any]]) -> list[str]:
    """Return the config keys that are not the same in all of `configs`."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def render(comparison: Comparison, form: str) -> str:
    """Return `comparison` as `text`, `md`, `csv` or `json`; only the latter two hold every column in full."""
    rows, sentences = table(comparison), verdicts(comparison)
    if form == "csv":
        return rows.to_csv(index=False)
    if form == "json":
        records = json.loads(rows.to_json(orient="records", double_precision=15))
        return json.dumps({"unit": comparison.unit, "runs": records, "words": sentences}, indent=2, ensure_ascii=False) + "\n"
    tables = [shown for shown in (shown_columns(rows), fold_differences(comparison)) if len(shown)]
    if form == "md":
        return "\n".join([*map(_markdown, tables), f"{caption(comparison)}\n", *(f"- {each}" for each in sentences)]) + "\n"
    return (
        "\n\n".join([*(shown.to_string(index=False) for shown in tables), "\n".join([caption(comparison), *sentences])]) + "\n"
    )


def fold_differences(comparison: Comparison) -> pd.DataFrame:
    """Return, as text, each paired run's AUC minus the baseline's in every fold, with its 95 % interval."""
    rows = [
        {f"minus {comparison.base.name}": entry.name}
        | {f"fold {k}": f"{fold.value:+.4f} {_ends(fold)}" for k, fold in enumerate(entry.folds)}
        for entry in comparison.entries
        if entry.pooled
    ]
    return pd.DataFrame(rows)


def _markdown(shown: pd.DataFrame) -> str:
    lines = [shown.columns.tolist(), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown_columns(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that a person reads, as text: intervals beside their values, empty where nothing is known."""

    def text(column: str, form: str) -> pd.Series:
        return rows[column].map(lambda value: "" if pd.isna(value) else format(value, form)).astype(str)

    def spanned(column: str, form: str) -> pd.Series:
        reasons = rows.get(f"undefined_{column}", pd.Series("", rows.index)).fillna("")
        ends = zip(rows[column], rows[f"{column}_low"], rows[f"{column}_high"], reasons, strict=True)
        return pd.Series(
            ["" if pd.isna(value) else f"{value:{form}} {interval_text(*rest, form)}" for value, *rest in ends], rows.index
        )

    shown = pd.DataFrame({"run": rows["run"]})
    for column in [column for column in rows if column.startswith("fold_") and column != "fold_seed"]:
        shown[column.replace("_", " ")] = text(column, ".4f")
    if "mean" in rows:
        shown["mean ± SD"] = (text("mean", ".4f") + " ± " + text("sd", ".4f")).where(rows["mean"].notna(), "")
        shown["pooled"], shown["ranked"] = spanned("pooled", ".4f"), text("ranked", ".4f")
        shown["interval unit"] = rows["interval_unit"].fillna("")
    if "difference" in rows:
        known = rows["p"].notna() | rows["difference"].isna()
        shown["difference"], shown["p"] = spanned("difference", "+.4f"), text("p", ".2g").where(known, "n/a")
    for column, form in (("minutes", ".1f"), ("parameters", ",.0f"), ("images_per_second", ",.0f")):
        if column in rows:
            shown[column.replace("images_per_second", "images/s")] = text(column, form)
    known = list(rows.columns)
    for column in known[known.index("differs") + 1 : known.index("note")]:
        shown[column] = rows[column].map(lambda value: "" if pd.isna(value) else str(value))
    shown["note"] = rows["note"]
    return shown


def _difference(column: str, made: Difference) -> dict[str, Any]:
    ends = {column: made.value, f"{column}_low": made.low, f"{column}_high": made.high}
    return ends | _reason(column, made.undefined)


def _reason(column: str, undefined: str) -> dict[str, str]:
    return {f"undefined_{column}": undefined} if undefined else {}


def _ends(made: Difference) -> str:
    return interval_text(made.low, made.high, made.undefined, "+.4f")


def _fall(plain: Entry, apart: Entry) -> float:
    return apart.metrics["pooled"]["value"] - plain.metrics["pooled"]["value"]


def _chance(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
