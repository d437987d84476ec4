"""Paired comparison of runs with a baseline: differences of AUC per fold and pooled, with intervals and p-values."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import Difference, Unit, holm
from pcam_kaggle.scoring.resampling import cluster_codes, paired_test, resampling, unit_of


@dataclass(slots=True)
class Entry:
    """One run of a comparison.

    Attributes:
        name: The name of the run.
        problem: Why the run cannot be scored, or "".
        metrics: The content of `metrics.json`.
        config: The fields of the run's config; empty for a blend.
        costs: Training time in `minutes`, `parameters`, and training `images_per_second`.
        scheme: The name of the fold file.
        oof: Columns id, label, fold, probability, sorted by id; None where the run cannot be scored.
        unpaired_reason: Why the run is not paired with the baseline, or "".
        folds: The difference to the baseline in each fold.
        pooled: The difference to the baseline over all folds.
        corrected_p: p of `pooled`, corrected for the number of runs; None where it is undefined.
    """

    name: str
    problem: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    scheme: str = ""
    oof: pd.DataFrame | None = None
    unpaired_reason: str = ""
    folds: list[Difference] = field(default_factory=list)
    pooled: Difference | None = None
    corrected_p: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs compared with the baseline.

    Attributes:
        entries: All runs, the baseline included.
        baseline: The entry that the others are compared with.
        unit: What differences resample.
        groups: The table (id, wsi) of the groups that are resampled; None for patches.
    """

    entries: list[Entry]
    baseline: Entry
    unit: Unit
    groups: pd.DataFrame | None = None


def compare_runs(workspace: Workspace, names: list[str], baseline: str | None, slides: Path | None) -> Comparison:
    """Compare runs of `workspace` with a baseline.

    Args:
        workspace: Holds the runs and the fold files.
        names: The runs to compare; empty for all.
        baseline: The name of the baseline; None for the run with the highest pooled AUC.
        slides: A slide map (id, wsi) to resample, which replaces the groups of the baseline's folds.

    Raises:
        UserError: A name is unknown, or no run can be scored; or as in `resampling`.
    """
    runs = workspace.root / "runs"
    found = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    unknown = [name for name in (*names, baseline) if name and name not in found]
    if unknown or not found:
        raise UserError(f"{runs}: holds {examples(found) or 'no run'}" + (f", not {', '.join(unknown)}" if unknown else ""))
    chosen = [name for name in found if not names or name in (*names, baseline)]
    entries = [read_entry(Run(runs / name)) for name in chosen]
    base = find_baseline(entries, baseline)
    assert base.oof is not None
    table, unit = resampling(base.scheme, base.oof, workspace.folds, slides)
    compare(entries, base, table, unit)
    return Comparison(entries, base, unit, table)


def read_entry(run: Run) -> Entry:
    """Return `run` as an entry, or why it can't be scored: unfinished, not blended, or damaged."""
    entry = Entry(run.name)
    try:
        if run.is_experiment:
            made = run.made_from()
            entry.config, entry.scheme = made["config"], made["folds"]
            unfinished = [str(fold.number) for fold in run.folds() if not fold.has_predictions]
            if unfinished:
                entry.problem = f"unfinished: folds {', '.join(unfinished)} lack predictions"
                return entry
            entry.costs = _costs([fold.metrics() for fold in run.folds()])
        if not run.has_score:
            entry.problem = "not blended: run `python -m pcam_kaggle blend`"
            return entry
        entry.metrics = run.blend_metrics(fold_auc=list, pooled=dict, ranked=dict, folds_sha256=str, oof_sha256=str)
        _check_numbers(entry.metrics)
        entry.oof = run.oof()
        if entry.metrics.get("missing_folds"):
            entry.problem = "blended without some of its folds: run `python -m pcam_kaggle blend`"
            return entry
        entry.scheme = entry.scheme or _blend_scheme(run, entry.metrics)
        unit_of(entry.scheme)
    except (UserError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        entry.problem = f"damaged: {' '.join(str(error).split())}"
    return entry


def find_baseline(entries: list[Entry], name: str | None) -> Entry:
    """Return the entry called `name`, or the one with the highest pooled AUC where `name` is None.

    Raises:
        UserError: The entry cannot be scored, or none can.
    """
    scored = [entry for entry in entries if not entry.problem]
    if name:
        named = next(entry for entry in entries if entry.name == name)
        if named.problem:
            raise UserError(f"--baseline {name}: {named.problem}")
        return named
    if not scored:
        problems = [f"{entry.name}: {entry.problem}" for entry in entries]
        raise UserError(f"none of {len(problems)} runs can be scored: {examples(problems)}", problems)
    return max(scored, key=lambda entry: entry.metrics["pooled"]["value"])


def compare(entries: list[Entry], baseline: Entry, groups: pd.DataFrame | None, unit: Unit = "slide") -> None:
    """Fill in the differences of all entries that can be scored to `baseline`, or `unpaired_reason`.

    A difference is the entry's AUC minus the baseline's on the same patches, per fold and pooled. p-values of the pooled
    differences are corrected for their number (Holm). An entry on other folds or patches is not paired.

    Args:
        entries: All runs; `baseline` may be one of them.
        baseline: The entry to compare with, which can be scored.
        groups: The groups (id, wsi) to resample by bootstrap; None for DeLong's paired test over patches.
        unit: What a group is called.

    Raises:
        ValueError: The fold scheme has groups and `groups` is None.
    """
    assert baseline.oof is not None
    for entry in entries:
        if entry is not baseline and not entry.problem:
            entry.unpaired_reason = _unpaired_reason(entry, baseline)
    paired = [entry for entry in entries if entry is not baseline and not entry.problem and not entry.unpaired_reason]
    labels, folds, theirs = (baseline.oof[column].to_numpy() for column in ("label", "fold", "probability"))
    codes = cluster_codes(baseline.oof["id"], groups, baseline.scheme)
    parts = [*(folds == k for k in np.unique(folds)), np.full(len(folds), True)]
    tests = [paired_test(labels[part], theirs[part], None if codes is None else codes[part], unit) for part in parts]
    for entry in paired:
        assert entry.oof is not None
        ours = entry.oof["probability"].to_numpy()
        *entry.folds, entry.pooled = [test(ours[part]) for part, test in zip(parts, tests, strict=True)]
    corrected = holm(np.array([entry.pooled.p for entry in paired if entry.pooled]))
    for entry, p in zip(paired, corrected.tolist(), strict=True):
        entry.corrected_p = None if np.isnan(p) else p


def _unpaired_reason(entry: Entry, baseline: Entry) -> str:
    """Return why `entry` cannot be paired with `baseline`, or ""."""
    assert entry.oof is not None
    assert baseline.oof is not None
    if entry.metrics["folds_sha256"] != baseline.metrics["folds_sha256"]:
        return f"not paired: folds or labels differ from those of {baseline.name}"
    if not entry.oof[["id", "label", "fold"]].equals(baseline.oof[["id", "label", "fold"]]):
        return f"not paired: patches differ from those of {baseline.name}"
    return ""


def _check_numbers(metrics: dict[str, Any]) -> None:
    """Validate the AUCs and intervals of a `metrics.json`.

    Raises:
        ValueError: An AUC is not finite, or an interval has neither ends nor a reason.
        TypeError: A value is not a number.
    """
    intervals = [metrics["pooled"], metrics["ranked"]]
    areas = [*metrics["fold_auc"], metrics["mean"], *(each["value"] for each in intervals)]
    if not np.isfinite(np.array(areas, np.float64)).all():
        raise ValueError("metrics.json has an AUC that is not a number; blend again")
    ends = [each[end] for each in intervals if not each.get("undefined") for end in ("low", "high")]
    if None in ends:
        raise ValueError("metrics.json has an interval without ends and without a reason; blend again")
    np.array([metrics["sd"], *ends], np.float64)


def _blend_scheme(run: Run, metrics: dict[str, Any]) -> str:
    """Return the fold scheme of the blend `run`, from its `metrics` or from the configs of its members.

    Raises:
        UserError: Neither has it.
    """
    if "scheme" in metrics:
        return str(metrics["scheme"])
    members = [Run(run.folder.parent / name) for name in metrics.get("members", {})]
    made = [member.made_from() for member in members if member.is_experiment]
    schemes = {each["folds"] for each in made if each["folds_sha256"] == metrics["folds_sha256"]}
    if len(made) < len(members) or len(schemes) != 1:
        raise UserError(f"{run.folder}: does not name its fold scheme, nor do its members' configs; blend again")
    return schemes.pop()


def _costs(folds: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        "minutes": round(sum(float(fold["seconds"]) for fold in folds) / 60, 1),
        "parameters": int(folds[0]["parameters"]),
        "images_per_second": float(np.median([float(fold["images_per_second"]) for fold in folds])),
    }
