"""Evaluation: the nets of runs on labelled patches that they were not trained on."""

import logging
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.labelled import LabelledPatches, read_labelled
from pcam_kaggle.data.listing import Ids
from pcam_kaggle.data.tables import PLAIN_NAME, read_slides
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.evaluation_table import Result, result_json
from pcam_kaggle.scoring.held_out import Mixture, Predictions, read_oof, score_runs

log = logging.getLogger(__name__)


def evaluate(
    workspace: Workspace,
    names: list[str],
    folder: Path,
    labels: Path,
    *,
    ids: Ids = "sha1",
    set_name: str | None = None,
    baseline: str | None = None,
    slides: Path | None = None,
    folds: tuple[int, ...] | None = None,
    perturb: bool = False,
) -> Result:
    """Predict labelled patches with the nets of runs, and score, compare and record the predictions.

    Args:
        workspace: Holds the runs and their fold files; predictions and scores are stored in its evaluations/<set_name>/.
        names: The runs, of experiments or blends of such.
        folder: Holds `<id>.tif` for each patch.
        labels: CSV of id,label.
        ids: How ids are made; see `read_labelled`.
        set_name: Name of the set of patches; by default that of the folder that holds `labels`.
        baseline: One of `names` that the others are compared with; None for the best.
        slides: CSV of id,wsi, whose slides are then resampled.
        folds: Folds whose nets predict; None for all that are trained.
        perturb: Whether the predictions are repeated under each perturbation.

    Returns:
        The scores, as `result_json` describes them.

    Raises:
        UserError: A run does not exist, was trained on some of the patches, or has other trained folds than another one; or
            as in `read_labelled`, `predict_labelled` and `read_slides`.
    """
    mixtures = [Mixture.of(Run(workspace.run(name))) for name in dict.fromkeys(names)]
    if baseline and baseline not in names:
        raise UserError(f"--baseline {baseline}: not among {examples(names)}")
    evaluation = _evaluation(workspace, set_name, labels)
    groups = read_slides(slides) if slides else None
    # torch takes seconds to import.
    from pcam_kaggle.training.held_out import predict_labelled, trained_folds
    from pcam_kaggle.training.perturb import PERTURBATIONS

    runs = {name: Run(workspace.run(name)) for name in dict.fromkeys(name for each in mixtures for name in each.weights)}
    trained = {name: trained_folds(run, folds) for name, run in runs.items()}
    first, *others = ([fold.number for fold in each] for each in trained.values())
    if any(other != first for other in others):
        lists = ", ".join(f"{name} {','.join(str(fold.number) for fold in each)}" for name, each in trained.items())
        raise UserError(f"other folds are trained in each run ({lists}); choose common ones with --folds")
    oof = {name: read_oof(each) for name, each in trained.items()}
    patches = read_labelled(folder, labels, ids)
    if slides and groups is not None:
        _check_slides(slides, groups, patches)
    if evaluation.has_result and evaluation.result()["patches_sha256"] != patches.sha256:
        raise UserError(
            f"{evaluation.folder}: holds results for other patches or labels; delete it, or choose another name with --name"
        )
    changes = [*PERTURBATIONS] if perturb else []
    with locked(evaluation.folder):
        predicted = {
            name: Predictions(predict_labelled(run, trained[name], patches, workspace, evaluation, changes), oof[name])
            for name, run in runs.items()
        }
        result = result_json(evaluation.name, patches.sha256, score_runs(mixtures, predicted, baseline, groups))
        evaluation.write_result(result)
    return result


def _evaluation(workspace: Workspace, name: str | None, labels: Path) -> Evaluation:
    name = name or labels.resolve().parent.name
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a plain file name; choose one with --name")
    return Evaluation(workspace.evaluations / name)


def _check_slides(file: Path, slides: pd.DataFrame, patches: LabelledPatches) -> None:
    lacking = int((~patches.table["id"].isin(slides["id"])).sum())
    if lacking == len(patches.table):
        raise UserError(f"--slides {file}: has none of the {lacking:,} patches; pass the slide map of these")
    if lacking:
        log.warning(
            "%s: lacks %s of %s patches, each of which counts as a slide", file, f"{lacking:,}", f"{len(patches.table):,}"
        )
