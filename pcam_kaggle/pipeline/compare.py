"""Comparison of runs: reads them and the groups that are resampled, for `scoring`."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples, program
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.folds import find_folds, read_groups
from pcam_kaggle.data.tables import read_numbers, read_slides, read_text
from pcam_kaggle.runs.records import IMPORTED
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import RunPredictions, score
from pcam_kaggle.scoring.compare import ComparedRun, Comparison, choose_folds, compare, find_reference, lacks
from pcam_kaggle.scoring.intervals import Clusters, family_of, unit_of
from pcam_kaggle.scoring.results import Unit
from pcam_kaggle.scoring.tables import render_comparison, score_lines

log = logging.getLogger(__name__)

# The groups (id, wsi) to resample, None to resample patches, and their unit.
Groups = tuple[pd.DataFrame | None, Unit]
Made = TypeVar("Made", ComparedRun, RunPredictions)


def compare_runs(
    workspace: Workspace,
    names: list[str],
    baseline: str | None = None,
    slides: Path | None = None,
    folds: tuple[int, ...] | None = None,
) -> Comparison:
    """Compare the runs `names` of `workspace`, all for none, with a baseline, or with the one of the highest pooled AUC.

    Out-of-fold predictions are compared, of `folds`, by default those of `choose_folds`. The slides of the map `slides` (id,
    wsi) are resampled in place of the groups of each run's folds. Raises UserError if a name is unknown, no run can be scored,
    or the runs that are named have no fold in common.
    """
    root = workspace.root / "runs"
    found = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    unknown = [name for name in (*names, baseline) if name and name not in found]
    if unknown or not found:
        raise UserError(f"{root}: holds {examples(found) or 'no run'}" + (f", not {', '.join(unknown)}" if unknown else ""))
    compared = [read_run(Run(root / name), workspace.folds) for name in found if not names or name in (*names, baseline)]
    chosen: dict[str, Sequence[int]] = {}
    groups: dict[str, Groups] = {}
    for run in compared:
        # The folds of another fold file are others, whatever their numbers.
        key = run.folds_sha256
        if key not in chosen:
            chosen[key] = folds or choose_folds([each for each in compared if each.folds_sha256 == key], bool(names))
        with _problem_of(run):
            run.problem = run.problem or lacks(run, chosen[key])
            if not run.problem:
                run.oof = _oof(Run(root / run.name), chosen[key])
                groups[key] = groups.get(key) or resampled_groups(run.scheme, run.oof, workspace.folds, slides)
                run.metrics = score(run.oof, Clusters.of(run.oof["id"], *groups[key]))
                run.costs = _costs(Run(root / run.name), run.metrics.folds) if run.config else {}
    reference = find_reference(compared, baseline)
    return compare(compared, reference, family_of(baseline), *groups[reference.folds_sha256])


def read_run(run: Run, folds: Path) -> ComparedRun:
    """Return `run` with what it has predicted, on a fold file in `folds`, or why it is not scored: unfinished or damaged."""
    compared = ComparedRun(run.name)
    with _problem_of(compared):
        (_read_experiment if run.is_experiment else _read_blend)(run, compared)
        return with_groups(compared, folds)
    return compared


def with_groups(made: Made, folder: Path) -> Made:
    """Return `made` on an equal fold file in `folder`, one with groups if there is any: folds that were given may lack them."""
    file = folder / f"{made.scheme}.csv"
    same = find_folds(read_text(file), folder) if made.scheme.startswith("given_") and file.is_file() else None
    return replace(made, scheme=same.scheme, folds_sha256=same.csv_sha256) if same else made


@contextlib.contextmanager
def _problem_of(compared: ComparedRun) -> Iterator[None]:
    """Note an error as the problem of `compared`, which must not keep other runs from being compared."""
    try:
        yield
    except (UserError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, UserError) else "damaged: "
        compared.problem = compared.problem or kind + " ".join(str(error).split())


def _read_experiment(run: Run, compared: ComparedRun) -> None:
    made = run.made_from()
    compared.config = {} if made.experiment == IMPORTED else made.config
    compared.scheme, compared.folds_sha256 = made.folds, made.folds_sha256
    compared.predicted, compared.n_splits = run.predicted_folds(), len(run.folds())
    if not compared.predicted:
        compared.problem = "unfinished: no fold is predicted"


def _read_blend(run: Run, compared: ComparedRun) -> None:
    if not run.has_score:
        compared.problem = f"not blended: run `{program()} blend`"
        return
    metrics = run.blend_metrics()
    if not metrics.scheme:
        compared.problem = f"blended by an earlier version: run `{program()} blend`"
        return
    compared.scheme, compared.folds_sha256 = metrics.scheme, metrics.folds_sha256
    # Files of earlier versions lack the numbers, since no fold was missing.
    compared.predicted = metrics.folds or [*range(len(metrics.fold_auc))]
    compared.n_splits = len(compared.predicted) + len(metrics.missing_folds)


def _oof(run: Run, folds: Sequence[int]) -> pd.DataFrame:
    table = pd.concat([run.fold(fold).oof() for fold in folds]) if run.is_experiment else run.oof()
    chosen = table.loc[table["fold"].isin(folds), ["id", "label", "fold", "probability"]]
    return chosen.sort_values("id", ignore_index=True)


def _costs(run: Run, folds: list[int]) -> dict[str, float | None]:
    metrics = [run.fold(number).metrics() for number in folds]
    return {
        "minutes": round(sum(fold.seconds for fold in metrics) / 60, 1),
        "parameters": metrics[0].parameters,
        "images_per_second": float(np.median([fold.images_per_second for fold in metrics])),
    }


def resampled_groups(scheme: str, oof: pd.DataFrame, folder: Path, slides: Path | None) -> Groups:
    """Return the groups to resample for the patches of `oof` (id, fold).

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
        print(render_comparison(compare_runs(workspace, [], scored[0].name), "text"), end="")
