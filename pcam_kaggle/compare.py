"""Which run is better, on which folds, and whether that is more than noise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.artifacts import file_sha256, read_json
from pcam_kaggle.errors import UserError
from pcam_kaggle.folds import groups, numbers
from pcam_kaggle.metrics import Difference, auc_difference, holm, slide_difference, slide_pairs
from pcam_kaggle.paths import Workspace
from pcam_kaggle.tables import read_slides

# A comparison by slides holds a square of them: 0.2 GB.
MOST_SLIDES = 5_000


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


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs held against the baseline, which is one of them."""

    entries: list[Entry]
    base: Entry


def compare_runs(workspace: Workspace, names: list[str], baseline: str | None, slides: Path | None) -> Comparison:
    """Compare the runs called `names`, all where none is named, with `baseline`, the best where it is None.

    Differences are pooled by slides where `slides` or the baseline's fold file tells them. Raises UserError on a name that is
    no run's and where no run can be scored.
    """
    runs = workspace.root / "runs"
    found = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    unknown = [name for name in (*names, baseline) if name and name not in found]
    if unknown or not found:
        raise UserError(f"{runs}: holds {', '.join(found) or 'no run'}" + (f", not {', '.join(unknown)}" if unknown else ""))
    chosen = [name for name in found if not names or name in (*names, baseline)]
    entries = [read_entry(runs / name) for name in chosen]
    base = find_baseline(entries, baseline)
    compare(entries, base, read_slides(slides) if slides else groups(workspace.folds / f"{base.scheme}.csv"))
    return Comparison(entries, base)


def read_entry(run: Path) -> Entry:
    """Return the run in folder `run`, or why it can't be scored: unfinished, not blended, or damaged."""
    entry = Entry(run.name)
    try:
        if (run / "config.json").exists():
            made = read_json(run / "config.json", config=dict, folds=str)
            entry.config, entry.scheme = made["config"], made["folds"]
            folds = numbers(run / "config.json", made["config"])
            left = [k for k in folds if not (run / f"fold_{k}" / "predictions.json").exists()]
            if left:
                entry.problem = f"unfinished: folds {', '.join(map(str, left))} are to be trained and predicted"
                return entry
            entry.costs = _costs([read_json(run / f"fold_{k}" / "metrics.json") for k in folds])
        if not (run / "metrics.json").exists():
            entry.problem = "not blended: run `python -m pcam_kaggle blend`"
            return entry
        entry.metrics = read_json(run / "metrics.json", fold_auc=list, pooled=dict, ranked=dict, oof_sha256=str)
        ends = [entry.metrics[kind][end] for kind in ("pooled", "ranked") for end in ("value", "low", "high")]
        np.array([*entry.metrics["fold_auc"], entry.metrics["mean"], entry.metrics["sd"], *ends], np.float64)
        if file_sha256(run / "oof.csv") != entry.metrics["oof_sha256"]:
            entry.problem = "damaged: oof.csv is not what metrics.json describes; blend again"
            return entry
        if entry.metrics.get("missing_folds"):
            entry.problem = "blended without some of its folds: run `python -m pcam_kaggle blend`"
            return entry
        entry.oof = pd.read_csv(run / "oof.csv", dtype={"id": str}).sort_values("id", ignore_index=True)
    except (UserError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
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

    Raises UserError where the map lacks too many of the baseline's patches.
    """
    assert base.oof is not None
    paired = [entry for entry in entries if entry is not base and not entry.problem and _is_paired(entry, base)]
    labels, folds, theirs = (base.oof[column].to_numpy() for column in ("label", "fold", "probability"))
    for entry in paired:
        assert entry.oof is not None
        ours = entry.oof["probability"].to_numpy()
        entry.folds = [auc_difference(labels[folds == k], ours[folds == k], theirs[folds == k]) for k in np.unique(folds)]
        if slides is None:
            entry.pooled = auc_difference(labels, ours, theirs)
    if slides is not None:
        # A patch that the map lacks stands for a slide of its own.
        codes, drawn = pd.factorize(base.oof["id"].map(slides.set_index("id")["wsi"]).fillna(base.oof["id"]))
        if len(drawn) > MOST_SLIDES:
            lacking = int((~base.oof["id"].isin(slides["id"])).sum())
            raise UserError(
                f"the slide map lacks {lacking:,} patches of {base.name}, each a slide of its own; of {len(drawn):,} slides no "
                f"more than {MOST_SLIDES:,} can be drawn; complete the map, or compare without it"
            )
        pairs = slide_pairs(labels, codes, theirs)
        for entry in paired:
            entry.pooled = slide_difference(
                labels, codes, slide_pairs(labels, codes, entry.oof["probability"].to_numpy()), pairs
            )
    for entry, p in zip(paired, holm(np.array([entry.pooled.p for entry in paired])), strict=True):
        entry.corrected = float(p)


def _is_paired(entry: Entry, base: Entry) -> bool:
    """Tell whether `entry` predicts the baseline's patches on its folds, and take down in `apart` why it does not."""
    assert entry.oof is not None
    assert base.oof is not None
    if entry.metrics["folds_sha256"] != base.metrics["folds_sha256"]:
        entry.apart = f"on other folds or labels than {base.name}, so not paired"
    elif not entry.oof[["id", "label", "fold"]].equals(base.oof[["id", "label", "fold"]]):
        entry.apart = f"on other patches than {base.name}, so not paired"
    return not entry.apart


def _costs(folds: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        "minutes": round(sum(float(fold["seconds"]) for fold in folds) / 60, 1),
        "parameters": int(folds[0]["parameters"]),
        "images_per_second": float(np.median([float(fold["images_per_second"]) for fold in folds])),
    }
