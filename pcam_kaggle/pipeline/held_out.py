"""Evaluation: the models of runs on a held-out set, labelled patches that they were not trained on."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.labelled import LabelledPatches, read_labelled
from pcam_kaggle.data.listing import Ids
from pcam_kaggle.data.tables import PLAIN_NAME, read_slides
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.held_out import EvaluationResult, score_runs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """A held-out set as files.

    Attributes:
        patches: Folder of `<id>.tif` for each patch.
        labels: CSV of id,label.
        ids: ID scheme; see `read_labelled`.
        name: Name of the set; None for that of the folder that holds `labels`.
        slides: CSV of id,wsi, whose slides are then resampled.
    """

    patches: Path
    labels: Path
    ids: Ids = "sha1"
    name: str | None = None
    slides: Path | None = None


def evaluate(
    workspace: Workspace,
    names: list[str],
    held_out: HeldOutSet,
    baseline: str | None = None,
    folds: tuple[int, ...] | None = None,
) -> EvaluationResult:
    """Predict a held-out set with the models of runs, and score, compare and record the predictions.

    Args:
        workspace: Holds the runs and their fold files; predictions and scores are stored in its evaluations/<set>/.
        names: The runs, of experiments or blends of such.
        held_out: The set.
        baseline: One of `names` that the others are compared with; None for the best.
        folds: Folds whose models predict; None for all that are trained.

    Raises:
        UserError: A run does not exist, was trained on some of the patches, or has other trained folds than another one; or
            as in `read_labelled`, `predict_held_out` and `read_slides`.
    """
    ensembles = [Run(workspace.run(name)).ensemble() for name in dict.fromkeys(names)]
    if baseline and baseline not in names:
        raise UserError(f"--baseline {baseline}: not among {examples(names)}")
    name = held_out.name or held_out.labels.resolve().parent.name
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a plain file name; choose one with --name")
    evaluation = Evaluation(workspace.evaluations / name)
    slides = read_slides(held_out.slides) if held_out.slides else None
    runs = [Run(workspace.run(run)) for run in dict.fromkeys(run for each in ensembles for run in each.weights)]
    trained = _common_folds(runs, folds)
    patches = read_labelled(held_out.patches, held_out.labels, held_out.ids)
    if held_out.slides and slides is not None:
        _check_slides(held_out.slides, slides, patches)
    if evaluation.result_file.exists() and evaluation.result().patches_sha256 != patches.sha256:
        raise UserError(
            f"{evaluation.folder}: holds results for other patches or labels; delete it, or choose another name with --name"
        )
    # torch takes seconds to import.
    from pcam_kaggle.training.held_out import predict_held_out

    with locked(evaluation.folder):
        tables = {run.name: predict_held_out(run, trained[run.name], patches, workspace, evaluation) for run in runs}
        oof = {run.name: _read_oof(trained[run.name]) for run in runs}
        result = score_runs(name, patches.sha256, ensembles, tables, oof, baseline, slides)
        result.write(evaluation.result_file)
    return result


def trained_folds(run: Run, chosen: tuple[int, ...] | None) -> list[Fold]:
    """Return the folds `chosen` of `run`, by default those that are trained.

    Raises:
        UserError: There is no such fold, it is not trained, or none is.
    """
    folds = run.chosen_folds(chosen)
    trained = [fold for fold in folds if fold.is_trained]
    untrained = [fold.number for fold in folds if fold not in trained]
    if not trained or (chosen and untrained):
        lacking = f"fold {untrained[0]} is not" if chosen else "no fold is"
        raise UserError(f"{run.folder}: {lacking} trained; train it first, or choose others with --folds")
    return trained


def _common_folds(runs: list[Run], chosen: tuple[int, ...] | None) -> dict[str, list[Fold]]:
    """Return the trained folds of each run; raises UserError if they differ."""
    trained = {run.name: trained_folds(run, chosen) for run in runs}
    numbers = {name: ",".join(str(fold.number) for fold in folds) for name, folds in trained.items()}
    if len(set(numbers.values())) > 1:
        lists = ", ".join(f"{name} {text}" for name, text in numbers.items())
        raise UserError(f"other folds are trained in each run ({lists}); choose common ones with --folds")
    return trained


def _read_oof(folds: list[Fold]) -> dict[int, pd.DataFrame]:
    return {fold.number: fold.predictions()[0].sort_values("id") for fold in folds if fold.has_predictions}


def _check_slides(file: Path, slides: pd.DataFrame, patches: LabelledPatches) -> None:
    lacking = int((~patches.table["id"].isin(slides["id"])).sum())
    if lacking == len(patches.table):
        raise UserError(f"--slides {file}: has none of the {lacking:,} patches; pass the slide map of these")
    if lacking:
        log.warning(
            "%s: lacks %s of %s patches, each of which counts as a slide", file, f"{lacking:,}", f"{len(patches.table):,}"
        )
