"""Evaluation: the nets of runs on labelled patches that they were not trained on."""

from pathlib import Path

import pandas as pd

from pcam_kaggle import UserError, examples
from pcam_kaggle.data.atomic_io import locked
from pcam_kaggle.data.csv_io import PLAIN_NAME, read_slides
from pcam_kaggle.data.labelled import LabelledPatches
from pcam_kaggle.data.layout import Workspace
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.evaluate import blended, score_runs
from pcam_kaggle.scoring.evaluation_table import Result, result_json


def evaluate(
    workspace: Workspace,
    names: list[str],
    patches: LabelledPatches,
    evaluation: Evaluation,
    *,
    baseline: str | None = None,
    slides: Path | None = None,
    folds: tuple[int, ...] | None = None,
    perturb: bool = False,
) -> Result:
    """Predict `patches` with the nets of runs, and score, compare and record the predictions.

    Args:
        workspace: Holds the runs and their fold files.
        names: The runs, of experiments or blends of such.
        patches: The patches, with labels.
        evaluation: Where predictions and scores are stored.
        baseline: One of `names` that the others are compared with; None for the best.
        slides: CSV of id,wsi, whose slides are then resampled.
        folds: Folds whose nets predict; None for all that are trained.
        perturb: Whether the predictions are repeated under each perturbation.

    Returns:
        The scores, as `result_json` describes them.

    Raises:
        UserError: A run does not exist or was trained on some of the patches, or as in `predict_labelled` and `read_slides`.
    """
    # torch takes seconds to import, and an unknown run is reported before.
    runs = [Run(workspace.run(name)) for name in names]
    for run in runs:
        if not (run.is_experiment or run.has_score):
            raise UserError(f"{run.folder}: no such run; train it, or name an existing one")
    if baseline and baseline not in names:
        raise UserError(f"--baseline {baseline}: not among {examples(names)}")
    groups = _slides(slides, patches.table) if slides else None
    members = {run.name: [run.name] if run.is_experiment else [*run.blend_metrics(members=dict)["members"]] for run in runs}
    from pcam_kaggle.training.evaluate import predict_labelled
    from pcam_kaggle.training.perturb import PERTURBATIONS

    changes = [*PERTURBATIONS] if perturb else []
    with locked(evaluation.folder):
        tables = {
            name: predict_labelled(Run(workspace.run(name)), patches, workspace, evaluation, folds, changes)
            for name in dict.fromkeys(name for each in members.values() for name in each)
        }
        tables |= {run.name: blended(run, tables) for run in runs if not run.is_experiment}
        result = result_json(evaluation.name, score_runs(runs, tables, baseline, groups))
        evaluation.write_result(result)
    return result


def evaluation_of(workspace: Workspace, name: str | None, labels: Path) -> Evaluation:
    """Return the evaluation called `name`, by default like the folder that holds the file `labels`.

    Raises:
        UserError: The name can't be a file name.
    """
    name = name or labels.resolve().parent.name
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a plain file name; choose one with --name")
    return Evaluation(workspace.evaluation(name))


def _slides(file: Path, table: pd.DataFrame) -> pd.DataFrame:
    slides = read_slides(file)
    if not table["id"].isin(slides["id"]).any():
        raise UserError(f"--slides {file}: has none of the {len(table):,} patches; pass the slide map of these")
    return slides
