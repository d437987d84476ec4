"""Which run is better, on which folds, and whether that is more than noise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle import UserError, examples
from pcam_kaggle.data.atomic_io import file_sha256, read_json
from pcam_kaggle.data.csv_io import check_oof
from pcam_kaggle.data.folds import numbers
from pcam_kaggle.data.layout import Workspace
from pcam_kaggle.scoring.metrics import Difference, Unit, holm, paired_test
from pcam_kaggle.scoring.resampling import clusters, resampling, unit_of


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
    """Runs held against the baseline, which is one of them.

    `unit` is what their differences resample: patches, or the groups in `slides` (id, wsi).
    """

    entries: list[Entry]
    base: Entry
    unit: Unit
    slides: pd.DataFrame | None = None


def compare_runs(workspace: Workspace, names: list[str], baseline: str | None, slides: Path | None) -> Comparison:
    """Compare the runs called `names`, all where none is named, with `baseline`, the best where it is None.

    Differences resample the slides of the map `slides`, else the unit of the baseline's folds. Raises UserError on a name that
    is no run's, where no run can be scored, and as `resampling`.
    """
    runs = workspace.root / "runs"
    found = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    unknown = [name for name in (*names, baseline) if name and name not in found]
    if unknown or not found:
        raise UserError(f"{runs}: holds {examples(found) or 'no run'}" + (f", not {', '.join(unknown)}" if unknown else ""))
    chosen = [name for name in found if not names or name in (*names, baseline)]
    entries = [read_entry(runs / name) for name in chosen]
    base = find_baseline(entries, baseline)
    assert base.oof is not None
    table, unit = resampling(base.scheme, base.oof, workspace.folds, slides)
    compare(entries, base, table, unit)
    return Comparison(entries, base, unit, table)


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
        entry.metrics = read_json(
            run / "metrics.json", fold_auc=list, pooled=dict, ranked=dict, folds_sha256=str, oof_sha256=str
        )
        _check_numbers(entry.metrics)
        if file_sha256(run / "oof.csv") != entry.metrics["oof_sha256"]:
            entry.problem = "damaged: oof.csv is not what metrics.json describes; blend again"
            return entry
        if entry.metrics.get("missing_folds"):
            entry.problem = "blended without some of its folds: run `python -m pcam_kaggle blend`"
            return entry
        entry.scheme = entry.scheme or _blend_scheme(run, entry.metrics)
        unit_of(entry.scheme)
        oof = pd.read_csv(run / "oof.csv", dtype={"id": str})
        entry.oof = check_oof(run / "oof.csv", oof).sort_values("id", ignore_index=True)
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
        problems = [f"{entry.name}: {entry.problem}" for entry in entries]
        raise UserError(f"none of {len(problems)} runs can be scored: {examples(problems)}", problems)
    return max(scored, key=lambda entry: entry.metrics["pooled"]["value"])


def compare(entries: list[Entry], base: Entry, slides: pd.DataFrame | None, unit: Unit = "slide") -> None:
    """Compare every entry that can be scored with `base` and fill in its differences.

    Differences are the entry's AUC minus the baseline's on the same patches, per fold and pooled: by a bootstrap over the
    groups called `unit` in `slides` (id, wsi), by DeLong's paired test over patches where it is None. p of the pooled ones is
    corrected for the number of those that are defined, by Holm. An entry on other folds or patches is not paired, and `apart`
    says so.

    Raises ValueError where the folds have groups and `slides` is None.
    """
    assert base.oof is not None
    paired = [entry for entry in entries if entry is not base and not entry.problem and _is_paired(entry, base)]
    labels, folds, theirs = (base.oof[column].to_numpy() for column in ("label", "fold", "probability"))
    codes = clusters(base.oof["id"], slides, base.scheme)
    parts = [*(folds == k for k in np.unique(folds)), np.full(len(folds), True)]
    tests = [paired_test(labels[part], theirs[part], None if codes is None else codes[part], unit) for part in parts]
    for entry in paired:
        assert entry.oof is not None
        ours = entry.oof["probability"].to_numpy()
        *entry.folds, entry.pooled = [test(ours[part]) for part, test in zip(parts, tests, strict=True)]
    corrected = holm(np.array([entry.pooled.p for entry in paired if entry.pooled]))
    for entry, p in zip(paired, corrected.tolist(), strict=True):
        entry.corrected = None if np.isnan(p) else p


def _is_paired(entry: Entry, base: Entry) -> bool:
    """Tell whether `entry` predicts the baseline's patches on its folds, and take down in `apart` why it does not."""
    assert entry.oof is not None
    assert base.oof is not None
    if entry.metrics["folds_sha256"] != base.metrics["folds_sha256"]:
        entry.apart = f"on other folds or labels than {base.name}, so not paired"
    elif not entry.oof[["id", "label", "fold"]].equals(base.oof[["id", "label", "fold"]]):
        entry.apart = f"on other patches than {base.name}, so not paired"
    return not entry.apart


def _check_numbers(metrics: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where an AUC in `metrics` is no number, or an interval has neither ends nor a reason."""
    intervals = [metrics["pooled"], metrics["ranked"]]
    areas = [*metrics["fold_auc"], metrics["mean"], *(each["value"] for each in intervals)]
    if not np.isfinite(np.array(areas, np.float64)).all():
        raise ValueError("metrics.json holds an AUC that is not a number; blend again")
    ends = [each[end] for each in intervals if not each.get("undefined") for end in ("low", "high")]
    if None in ends:
        raise ValueError("metrics.json holds an interval without ends and without a reason; blend again")
    np.array([metrics["sd"], *ends], np.float64)


def _blend_scheme(run: Path, metrics: dict[str, Any]) -> str:
    """Return the fold scheme of the blend in folder `run`: the one in its `metrics`, else that of its members beside it.

    Raises UserError where neither tells it.
    """
    if "scheme" in metrics:
        return str(metrics["scheme"])
    members = [run.parent / name / "config.json" for name in metrics.get("members", {})]
    made = [read_json(file, folds=str, folds_sha256=str) for file in members if file.exists()]
    schemes = {each["folds"] for each in made if each["folds_sha256"] == metrics["folds_sha256"]}
    if len(made) < len(members) or len(schemes) != 1:
        raise UserError(f"{run / 'metrics.json'}: does not name its fold scheme, nor do its members' configs; blend again")
    return schemes.pop()


def _costs(folds: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        "minutes": round(sum(float(fold["seconds"]) for fold in folds) / 60, 1),
        "parameters": int(folds[0]["parameters"]),
        "images_per_second": float(np.median([float(fold["images_per_second"]) for fold in folds])),
    }
