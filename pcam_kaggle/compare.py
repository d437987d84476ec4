"""Which run is better, on which folds, and whether that is more than noise."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.artifacts import file_sha256, read_json
from pcam_kaggle.errors import UserError
from pcam_kaggle.metrics import Difference, auc_difference, holm, slide_difference

LEVEL = 0.05
# Two-sided 5 % and 80 % power: how many standard errors a difference must be wide to be found four times in five.
FOUND = 1.96 + 0.84
FORMATS = ("text", "md", "csv", "json")


@dataclass(slots=True)
class Entry:
    """One run in a comparison: `problem` says why it can't be scored, else `oof` has id, label, fold, probability."""

    name: str
    problem: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    scheme: str = ""
    oof: pd.DataFrame | None = None
    apart: str = ""
    folds: list[Difference] = field(default_factory=list)
    pooled: Difference | None = None
    corrected: float | None = None


def read_entry(run: Path) -> Entry:
    """Return the run in folder `run`, or why it can't be scored: unfinished, not blended, or damaged."""
    entry = Entry(run.name)
    try:
        if (run / "config.json").exists():
            made = read_json(run / "config.json")
            entry.config, entry.scheme = made["config"], made["folds"]
            left = [k for k in range(made["config"]["n_splits"]) if not (run / f"fold_{k}" / "predictions.json").exists()]
            if left:
                entry.problem = f"unfinished: folds {', '.join(map(str, left))} are to be trained and predicted"
                return entry
            entry.costs = _costs([read_json(run / f"fold_{k}" / "metrics.json") for k in range(made["config"]["n_splits"])])
        if not (run / "metrics.json").exists():
            entry.problem = "not blended: run `python -m pcam_kaggle blend`"
            return entry
        entry.metrics = read_json(run / "metrics.json")
        if file_sha256(run / "oof.csv") != entry.metrics["oof_sha256"]:
            entry.problem = "damaged: oof.csv is not what metrics.json describes; blend again"
            return entry
        entry.oof = pd.read_csv(run / "oof.csv", dtype={"id": str}).sort_values("id", ignore_index=True)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        entry.problem = f"damaged: {' '.join(str(error).split())}"
    return entry


def find_baseline(entries: list[Entry], name: str | None) -> Entry:
    """Return the entry called `name`, else the one with the highest pooled AUC; raises UserError where it can't be scored."""
    scored = [entry for entry in entries if not entry.problem]
    if name:
        named = next(entry for entry in entries if entry.name == name)
        if named.problem:
            raise UserError(f"--baseline {name}: {named.problem}")
        return named
    if not scored:
        raise UserError("no run can be scored: " + "; ".join(f"{entry.name}: {entry.problem}" for entry in entries))
    return max(scored, key=lambda entry: entry.metrics["pooled"]["value"])


def compare(entries: list[Entry], base: Entry, slides: pd.DataFrame | None) -> None:
    """Hold every entry that can be scored against `base` and fill in its differences.

    Differences are the entry's AUC minus the baseline's on the same patches, per fold and pooled, by DeLong's paired test,
    pooled by slides where `slides` (id, wsi) are given; p of the pooled ones is corrected for their number by Holm. An entry
    on other folds or patches is not paired, and `apart` says so.
    """
    assert base.oof is not None
    codes = None
    if slides is not None:
        # A patch that the map lacks stands for a slide of its own.
        codes = pd.factorize(base.oof["id"].map(slides.set_index("id")["wsi"]).fillna(base.oof["id"]))[0]
    for entry in entries:
        if entry is not base and not entry.problem:
            _hold(entry, base, codes)
    paired = [(entry, entry.pooled.p) for entry in entries if entry.pooled]
    for (entry, _), p in zip(paired, holm(np.array([p for _, p in paired])), strict=True):
        entry.corrected = float(p)


def words(entry: Entry, base: Entry) -> str:
    """Return in a sentence what follows from the pooled difference of `entry` to `base`."""
    if entry.pooled is None:
        return f"{entry.name}: {entry.problem or entry.apart}."
    value, low, high, error, _ = entry.pooled
    span = f"{abs(value):.4f} [{min(abs(low), abs(high)):.4f}, {max(abs(low), abs(high)):.4f}]"
    if entry.corrected is not None and entry.corrected < LEVEL and low * high > 0:
        better, worse = (entry, base) if value > 0 else (base, entry)
        return f"{better.name} is better than {worse.name} by {span}, {_chance(entry.corrected)}."
    signed = f"{value:+.4f} [{low:+.4f}, {high:+.4f}], {_chance(entry.corrected)}"
    sentence = f"{entry.name} against {base.name}: no difference that this data can show ({signed})"
    if not value:
        return f"{sentence}."
    assert base.oof is not None
    patches = len(base.oof)
    needed = patches * (FOUND * error / abs(value)) ** 2
    more = max(0, round(needed - patches, 1 - len(str(round(needed)))))
    return f"{sentence}; were it real, about {more:,.0f} more patches would show it four times in five."


def table(entries: list[Entry], base: Entry) -> pd.DataFrame:
    """Return one row per entry, best first: AUC per fold, mean, SD, pooled, ranked, differences, costs, and what differs.

    Entries that can't be scored come last, with the reason in `note`. The columns between `differs` and `note` are the
    config's fields that are not the same everywhere.
    """
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
        if entry.pooled:
            row |= {"difference": entry.pooled.value, "difference_low": entry.pooled.low, "difference_high": entry.pooled.high}
            row |= {"p": entry.corrected} | {f"difference_{k}": fold.value for k, fold in enumerate(entry.folds)}
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


def _hold(entry: Entry, base: Entry, codes: np.ndarray | None) -> None:
    assert entry.oof is not None
    assert base.oof is not None
    if entry.metrics["folds_sha256"] != base.metrics["folds_sha256"]:
        entry.apart = f"on other folds or labels than {base.name}, so not paired"
        return
    if not entry.oof[["id", "label", "fold"]].equals(base.oof[["id", "label", "fold"]]):
        entry.apart = f"on other patches than {base.name}, so not paired"
        return
    labels, folds = base.oof["label"].to_numpy(), base.oof["fold"].to_numpy()
    ours, theirs = entry.oof["probability"].to_numpy(), base.oof["probability"].to_numpy()
    for fold in np.unique(folds):
        inside = folds == fold
        entry.folds.append(auc_difference(labels[inside], ours[inside], theirs[inside]))
    if codes is None:
        entry.pooled = auc_difference(labels, ours, theirs)
    else:
        entry.pooled = slide_difference(labels, codes, ours, theirs)


def render(rows: pd.DataFrame, sentences: list[str], form: str) -> str:
    """Return the comparison as `text`, `md`, `csv` or `json`; only the latter two hold every column in full."""
    if form == "csv":
        return rows.to_csv(index=False)
    if form == "json":
        records = json.loads(rows.to_json(orient="records", double_precision=15))
        return json.dumps({"runs": records, "words": sentences}, indent=2, ensure_ascii=False) + "\n"
    shown = _shown(rows)
    if form == "md":
        lines = [shown.columns.tolist(), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
        return (
            "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n".join(f"- {s}" for s in sentences) + "\n"
        )
    return shown.to_string(index=False) + "\n\n" + "\n".join(sentences) + "\n"


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that a person reads, as text: intervals beside their values, empty where nothing is known."""

    def text(column: str, form: str) -> pd.Series:
        return rows[column].map(lambda value: "" if pd.isna(value) else format(value, form)).astype(str)

    def spanned(column: str, form: str) -> pd.Series:
        span = text(column, form) + " [" + text(f"{column}_low", form) + ", " + text(f"{column}_high", form) + "]"
        return span.where(rows[column].notna(), "")

    shown = pd.DataFrame({"run": rows["run"]})
    for column in [column for column in rows if column.startswith("fold_") and column != "fold_seed"]:
        shown[column.replace("_", " ")] = text(column, ".4f")
    if "mean" in rows:
        shown["mean ± SD"] = (text("mean", ".4f") + " ± " + text("sd", ".4f")).where(rows["mean"].notna(), "")
        shown["pooled"], shown["ranked"] = spanned("pooled", ".4f"), text("ranked", ".4f")
    if "difference" in rows:
        shown["difference"], shown["p"] = spanned("difference", "+.4f"), text("p", ".2g")
    for column, form in (("minutes", ".1f"), ("parameters", ",.0f"), ("images_per_second", ",.0f")):
        if column in rows:
            shown[column.replace("images_per_second", "images/s")] = text(column, form)
    known = list(rows.columns)
    for column in known[known.index("differs") + 1 : known.index("note")]:
        shown[column] = rows[column].map(lambda value: "" if pd.isna(value) else str(value))
    shown["note"] = rows["note"]
    return shown


def _chance(p: float | None) -> str:
    return "p < 0.0001" if p is not None and p < 1e-4 else f"p = {p:.2g}"


def _costs(folds: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        "minutes": round(sum(fold["seconds"] for fold in folds) / 60, 1),
        "parameters": folds[0]["parameters"],
        "images_per_second": float(np.median([fold["images_per_second"] for fold in folds])),
    }
