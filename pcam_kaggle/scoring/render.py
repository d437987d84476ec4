"""A comparison as text, Markdown, CSV or JSON: a table of the runs and the conclusions in sentences."""

import json
from typing import Any

import pandas as pd

from pcam_kaggle.scoring.compare import Comparison, Entry
from pcam_kaggle.scoring.metrics import Difference, Unit, interval_text
from pcam_kaggle.scoring.resampling import unit_of

PLURALS: dict[Unit, str] = {"patch": "patches", "slide": "slides", "stain group": "stain groups"}
LEVEL = 0.05
# Standard errors that a difference must span for a two-sided test at 5 % to detect it with 80 % power.
POWER = 1.96 + 0.84


def describe_difference(entry: Entry, baseline: Entry) -> str:
    """Return one sentence on the pooled difference of `entry` to `baseline`, with its interval, p and unit."""
    if entry.pooled is None:
        return f"{entry.name}: {entry.problem or entry.unpaired_reason}."
    difference, unit = entry.pooled, f"unit: {entry.pooled.unit}"
    if entry.corrected_p is None:
        reason = f"interval and p n/a ({difference.undefined}; {unit})"
        return f"{entry.name} compared with {baseline.name}: {difference.value:+.4f}, {reason}."
    if entry.corrected_p < LEVEL and difference.low * difference.high > 0:
        better, worse = (entry, baseline) if difference.value > 0 else (baseline, entry)
        low, high = sorted([abs(difference.low), abs(difference.high)])
        gain = f"{abs(difference.value):.4f} {interval_text(low, high, '')}"
        return f"{better.name} is better than {worse.name} by {gain}, {p_text(entry.corrected_p)} ({unit})."
    numbers = f"{difference.value:+.4f} {_interval(difference)}, {p_text(entry.corrected_p)}; {unit}"
    sentence = f"{entry.name} compared with {baseline.name}: no significant difference ({numbers})."
    if not difference.value:
        return sentence
    needed = difference.units * (POWER * difference.error / abs(difference.value)) ** 2
    more = max(0, round(needed - difference.units, 1 - len(str(round(needed)))))
    amount = f"about {more:,.0f} more {PLURALS[difference.unit]}"
    return f"{sentence} To detect a difference of this size with 80 % power, {amount} are needed."


def caption(comparison: Comparison) -> str:
    """Return how differences, their intervals and p-values are computed."""
    unit, baseline = comparison.unit, comparison.baseline
    test = "DeLong's paired test" if comparison.groups is None else f"a paired bootstrap over {PLURALS[unit]}"
    text = (
        f"Differences with 95 % intervals and p (unit: {unit}) are from {test}; p is corrected for the number of runs (Holm)."
    )
    if comparison.groups is not None and baseline.oof is not None:
        missing = int((~baseline.oof["id"].isin(comparison.groups["id"])).sum())
        text += f" Each of {missing:,} patches that the slide map lacks counts as a {unit}." if missing else ""
    return text


def conclusions(comparison: Comparison) -> list[str]:
    """Return a sentence for each run but the baseline, and for each pair of runs that differ only in the fold scheme."""
    others = [entry for entry in comparison.entries if entry is not comparison.baseline]
    return [
        *(describe_difference(entry, comparison.baseline) for entry in others),
        *compare_fold_schemes(comparison.entries),
    ]


def compare_fold_schemes(entries: list[Entry]) -> list[str]:
    """Return a sentence for each pair of runs with the same config, one on stratified folds and one on grouped folds."""
    configs = {entry.name: {key: value for key, value in entry.config.items() if key != "groups"} for entry in entries}
    scored = [entry for entry in entries if entry.scheme and not entry.problem]
    stratified = [entry for entry in scored if unit_of(entry.scheme) == "patch"]
    grouped = [entry for entry in scored if unit_of(entry.scheme) != "patch"]
    sentences = []
    for first, second in [(a, b) for a in stratified for b in grouped if configs[a.name] == configs[b.name]]:
        before, after = (entry.metrics["pooled"]["value"] for entry in (first, second))
        sentences.append(
            f"{first.name} and {second.name} have the same config: pooled AUC {before:.4f} on {first.scheme}, {after:.4f} on "
            f"{second.scheme} ({after - before:+.4f}), where patches of one {unit_of(second.scheme)} share a fold."
        )
    return sentences


def comparison_table(comparison: Comparison) -> pd.DataFrame:
    """Return one row per run, best first; runs that cannot be scored come last.

    Returns:
        Columns `run`; `fold_0`, ... (AUC); `mean`, `sd`; `pooled` and `ranked` with `_low` and `_high`; `interval_unit`, the
        unit of these intervals; `difference` with its interval and `p`, also per fold (`difference_0`, `p_0`, ...); `unit`, the
        unit of the differences; costs; `differs`, the number of config fields that differ between runs; these fields; `note`.
        Undefined values are NaN. A column `undefined_X` gives the reason, and is present only where X is undefined.
    """
    keys = differing_keys([entry.config for entry in comparison.entries if entry.config])
    ordered = sorted(comparison.entries, key=lambda each: (bool(each.problem), -each.metrics.get("pooled", {}).get("value", 0)))
    rows = [_row(entry, comparison, keys) for entry in ordered]
    columns = dict.fromkeys(column for row in rows for column in row)
    last = ["differs", *keys, "note"]
    return pd.DataFrame(rows, columns=[*(column for column in columns if column not in last), *last])


def _row(entry: Entry, comparison: Comparison, keys: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": entry.name}
    if not entry.problem:
        metrics = entry.metrics
        row |= {f"fold_{k}": value for k, value in enumerate(metrics["fold_auc"])}
        row |= {"mean": metrics["mean"], "sd": metrics["sd"]}
        for kind in ("pooled", "ranked"):
            made = metrics[kind]
            row |= _with_interval(kind, made["value"], made["low"], made["high"], made.get("undefined", ""))
        # Files of older versions have no unit; their intervals are DeLong's.
        row["interval_unit"] = metrics["pooled"].get("unit", "patch")
    if entry.pooled:
        row |= _difference("difference", entry.pooled) | {"p": entry.corrected_p}
        for k, fold in enumerate(entry.folds):
            row |= _difference(f"difference_{k}", fold) | {f"p_{k}": fold.p}
    is_baseline = entry is comparison.baseline
    if entry.pooled or is_baseline:
        row["unit"] = comparison.unit
    row |= entry.costs | {"differs": len(keys)} | {key: entry.config.get(key) for key in keys}
    row["note"] = entry.problem or entry.unpaired_reason or ("the baseline" if is_baseline else "")
    return row


def differing_keys(configs: list[dict[str, Any]]) -> list[str]:
    """Return the config keys whose values differ between `configs`."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def render(comparison: Comparison, form: str) -> str:
    """Return `comparison` as `text`, `md`, `csv` or `json`; only `csv` and `json` have all columns in full precision."""
    rows, sentences = comparison_table(comparison), conclusions(comparison)
    if form == "csv":
        return rows.to_csv(index=False)
    if form == "json":
        records = json.loads(rows.to_json(orient="records", double_precision=15))
        return json.dumps({"unit": comparison.unit, "runs": records, "words": sentences}, indent=2, ensure_ascii=False) + "\n"
    tables = [shown for shown in (display_table(rows), fold_differences(comparison)) if len(shown)]
    if form == "md":
        return "\n".join([*map(markdown, tables), f"{caption(comparison)}\n", *(f"- {each}" for each in sentences)]) + "\n"
    return (
        "\n\n".join([*(shown.to_string(index=False) for shown in tables), "\n".join([caption(comparison), *sentences])]) + "\n"
    )


def fold_differences(comparison: Comparison) -> pd.DataFrame:
    """Return the AUC of each paired run minus the baseline's in each fold, with its 95 % interval, as text."""
    rows = [
        {f"minus {comparison.baseline.name}": entry.name}
        | {f"fold {k}": f"{fold.value:+.4f} {_interval(fold)}" for k, fold in enumerate(entry.folds)}
        for entry in comparison.entries
        if entry.pooled
    ]
    return pd.DataFrame(rows)


def display_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the main columns of `comparison_table` as text, with intervals next to their values and "" for NaN."""
    shown = pd.DataFrame({"run": rows["run"]})
    for column in [column for column in rows if column.startswith("fold_")]:
        shown[column.replace("_", " ")] = _formatted(rows[column], ".4f")
    if "mean" in rows:
        deviation = _formatted(rows["mean"], ".4f") + " ± " + _formatted(rows["sd"], ".4f")
        shown["mean ± SD"] = deviation.where(rows["mean"].notna(), "")
        shown["pooled"], shown["ranked"] = _with_intervals(rows, "pooled", ".4f"), _formatted(rows["ranked"], ".4f")
        shown["interval unit"] = rows["interval_unit"].fillna("")
    if "difference" in rows:
        known = rows["p"].notna() | rows["difference"].isna()
        shown["difference"] = _with_intervals(rows, "difference", "+.4f")
        shown["p"] = _formatted(rows["p"], ".2g").where(known, "n/a")
    for column, form in (("minutes", ".1f"), ("parameters", ",.0f"), ("images_per_second", ",.0f")):
        if column in rows:
            shown[column.replace("images_per_second", "images/s")] = _formatted(rows[column], form)
    columns = list(rows.columns)
    for column in columns[columns.index("differs") + 1 : columns.index("note")]:
        shown[column] = _formatted(rows[column], "")
    shown["note"] = rows["note"]
    return shown


def _formatted(values: pd.Series, form: str) -> pd.Series:
    texts = ["" if pd.isna(value) else format(value, form) for value in values]
    return pd.Series(texts, values.index, dtype=object)


def _with_intervals(rows: pd.DataFrame, column: str, form: str) -> pd.Series:
    reasons = rows.get(f"undefined_{column}", pd.Series("", rows.index)).fillna("")
    texts = [
        "" if pd.isna(value) else f"{value:{form}} {interval_text(low, high, reason, form)}"
        for value, low, high, reason in zip(rows[column], rows[f"{column}_low"], rows[f"{column}_high"], reasons, strict=True)
    ]
    return pd.Series(texts, rows.index, dtype=object)


def markdown(shown: pd.DataFrame) -> str:
    """Return a table of text as Markdown."""
    lines = [shown.columns.tolist(), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _difference(column: str, difference: Difference) -> dict[str, Any]:
    return _with_interval(column, difference.value, difference.low, difference.high, difference.undefined)


def _with_interval(column: str, value: float, low: float | None, high: float | None, undefined: str) -> dict[str, Any]:
    reason = {f"undefined_{column}": undefined} if undefined else {}
    return {column: value, f"{column}_low": low, f"{column}_high": high} | reason


def _interval(difference: Difference) -> str:
    return interval_text(difference.low, difference.high, difference.undefined, "+.4f")


def p_text(p: float) -> str:
    """Return a p-value as text."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
