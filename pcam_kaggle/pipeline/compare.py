"""Comparison of runs: reads them and the groups that are resampled, for `scoring`."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.core.config import upgraded
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.folds import read_groups
from pcam_kaggle.data.tables import read_numbers, read_slides
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.compare import ComparedRun, Comparison, compare, find_baseline
from pcam_kaggle.scoring.intervals import unit_of
from pcam_kaggle.scoring.results import Unit
from pcam_kaggle.scoring.tables import render_comparison, score_lines

log = logging.getLogger(__name__)


def compare_runs(workspace: Workspace, names: list[str], baseline: str | None, slides: Path | None) -> Comparison:
    """Compare the runs `names` of `workspace`, all for none, with a baseline, by default the one with the highest pooled AUC.

    The slides of the map `slides` (id, wsi) are resampled in place of the groups of the baseline's folds. Raises UserError if a
    name is unknown or no run can be scored, or as in `resampled_groups`.
    """
    runs = workspace.root / "runs"
    found = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    unknown = [name for name in (*names, baseline) if name and name not in found]
    if unknown or not found:
        raise UserError(f"{runs}: holds {examples(found) or 'no run'}" + (f", not {', '.join(unknown)}" if unknown else ""))
    compared = [read_run(Run(runs / name)) for name in found if not names or name in (*names, baseline)]
    base = find_baseline(compared, baseline)
    table, unit = resampled_groups(base.scheme, base.scored()[0], workspace.folds, slides)
    return compare(compared, base, table, unit)


def read_run(run: Run) -> ComparedRun:
    """Return `run` as one of a comparison, or why it can't be scored: unfinished, not blended, or damaged."""
    compared = ComparedRun(run.name)
    try:
        compared.problem = _read(run, compared)
    except (UserError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        compared.problem = f"damaged: {' '.join(str(error).split())}"
    return compared


def _read(run: Run, compared: ComparedRun) -> str:
    """Fill in what can be read of `run`; return why it can't be scored, or ""."""
    if run.is_experiment:
        made = run.made_from()
        compared.config, compared.scheme = upgraded(made.config), made.folds
        unfinished = [str(fold.number) for fold in run.folds() if not fold.has_predictions]
        if unfinished:
            return f"unfinished: folds {', '.join(unfinished)} lack predictions"
        folds = [fold.metrics() for fold in run.folds()]
        compared.costs = {
            "minutes": round(sum(fold.seconds for fold in folds) / 60, 1),
            "parameters": folds[0].parameters,
            "images_per_second": float(np.median([fold.images_per_second for fold in folds])),
        }
    if not run.has_score:
        return "not blended: run `python -m pcam_kaggle blend`"
    compared.metrics, compared.oof = run.blend_metrics(), run.oof()
    if compared.metrics.missing_folds:
        return "blended without some of its folds: run `python -m pcam_kaggle blend`"
    compared.scheme = compared.scheme or compared.metrics.scheme
    if not compared.scheme:
        return "blended by an earlier version: run `python -m pcam_kaggle blend`"
    unit_of(compared.scheme)
    return ""


def resampled_groups(scheme: str, oof: pd.DataFrame, folder: Path, slides: Path | None) -> tuple[pd.DataFrame | None, Unit]:
    """Return the groups (id, wsi) to resample for the patches of `oof` (id, fold), None to resample patches, and their unit.

    They are those of the fold file of `scheme` in `folder`, or of the slide map `slides` (id, wsi). Raises UserError if the
    file is missing or has other folds than `oof`, or if the map has none of the patches.
    """
    if slides:
        return read_slide_map(slides, oof["id"]), "slide"
    unit, file = unit_of(scheme), folder / f"{scheme}.csv"
    if unit == "patch":
        return None, unit
    if file.is_file():
        folds, table = read_numbers(file, ["fold"]).set_index("id")["fold"], read_groups(file)
        if table is not None and np.array_equal(folds.reindex(oof["id"]), oof["fold"]):
            return table, unit
    problem = f"missing, or not the folds of these runs; intervals and tests need its {unit}s"
    raise UserError(f"{file}: {problem}; restore it, or pass a slide map with --slides")


def read_slide_map(file: Path, ids: pd.Series) -> pd.DataFrame:
    """Return the slide map (id, wsi) in `file`; warns if it lacks some of `ids` (n,), and raises UserError if it lacks all."""
    slides = read_slides(file)
    lacking = int((~ids.isin(slides["id"])).sum())
    if lacking == len(ids):
        raise UserError(f"--slides {file}: has none of the {lacking:,} patches; pass the slide map of this data set")
    if lacking:
        log.warning("%s: lacks %s of %s patches, each of which counts as a slide", file, f"{lacking:,}", f"{len(ids):,}")
    return slides


def print_result(workspace: Workspace, names: list[str]) -> None:
    """Print the score of the first of the runs `names` that has one; if it has all folds, also its comparison with all runs."""
    scored = [run for run in (Run(workspace.run(name)) for name in names) if run.has_score]
    if not scored:
        print(f"{names[0]}: no fold is finished")
        return
    metrics = scored[0].blend_metrics()
    print("\n".join([f"{scored[0].name}:", *(f"  {line}" for line in score_lines(metrics))]))
    if not metrics.missing_folds and sum(path.is_dir() for path in (workspace.root / "runs").iterdir()) > 1:
        print(render_comparison(compare_runs(workspace, [], scored[0].name, None), "text"), end="")
