"""Predictions of a run's nets for labelled patches that none of them was trained on."""

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pcam_kaggle import UserError, examples
from pcam_kaggle.config.logs import fold_context
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import file_sha256
from pcam_kaggle.data.csv_io import read_numbers
from pcam_kaggle.data.labelled import LabelledPatches, Patches
from pcam_kaggle.data.layout import Workspace
from pcam_kaggle.runs.evaluation import UNCHANGED, Evaluation
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.fold_state import load_best
from pcam_kaggle.training.perturb import PERTURBATIONS, Perturbed
from pcam_kaggle.training.predict import predict_probabilities
from pcam_kaggle.training.session import find_backend

log = logging.getLogger(__name__)


def predict_labelled(
    run: Run,
    patches: LabelledPatches,
    workspace: Workspace,
    evaluation: Evaluation,
    chosen: Sequence[int] | None,
    changes: Sequence[str] = (),
) -> dict[str, pd.DataFrame]:
    """Return the predictions of the nets of `run`, computed unless `evaluation` has them.

    Args:
        run: An experiment's run.
        patches: The patches, with labels.
        workspace: Where the run's folds were drawn.
        evaluation: Where predictions are stored.
        chosen: Folds whose nets predict; None for all that are trained.
        changes: Names of perturbations to repeat the predictions under.

    Returns:
        For `unchanged` and for each of `changes`: columns id, label, and `fold_<k>` with probabilities.

    Raises:
        UserError: A fold is not trained, a checkpoint is damaged, or `run` was trained on some of the patches.
    """
    folds = [run.fold(number) for number in chosen] if chosen else [fold for fold in run.folds() if fold.is_trained]
    untrained = [fold.number for fold in folds if not fold.is_trained]
    if untrained or not folds:
        lacking = f"fold {untrained[0]} is" if untrained else "no fold is"
        raise UserError(f"{run.folder}: {lacking} trained; run `python -m pcam_kaggle train`, or choose others with --folds")
    refuse_trained(run, patches, workspace)
    made = run.made_from()
    try:
        config = Config(**made["config"])
    except UserError as error:
        raise UserError(f"{run.folder}: {error}; use the version that trained it") from None
    checkpoints = {str(fold.number): file_sha256(fold.best_checkpoint) for fold in folds}
    sources = {"patches_sha256": patches.sha256, "checkpoints": checkpoints}
    tables = {change: evaluation.predictions(run.name, change, sources) for change in (UNCHANGED, *changes)}
    missing = [change for change, table in tables.items() if table is None]
    backend = find_backend(run, config) if missing else None
    for change in missing:
        assert backend is not None
        changed = patches if change == UNCHANGED else Perturbed(patches, PERTURBATIONS[change])
        table = _predict(folds, changed, patches.table[["id", "label"]], config, backend)
        evaluation.write_predictions(run.name, change, sources, table)
        tables[change] = table
    log.debug("evaluate: %s predicted %d of %d tables", run.name, len(missing), len(tables))
    return {change: table for change, table in tables.items() if table is not None}


def refuse_trained(run: Run, patches: LabelledPatches, workspace: Workspace) -> None:
    """Raise UserError if `run` was trained or validated on one of `patches`: its id, or its pixels under another id.

    For a run with a teacher this includes the test patches, whose predicted labels it was trained on. The ids are those of the
    fold file, which must therefore exist.
    """
    made = run.made_from()
    file = workspace.folds / f"{made['folds']}.csv"
    if not file.is_file() or file_sha256(file) != made["folds_sha256"]:
        raise UserError(f"{file}: missing or not the folds of {run.name}, so its train patches are not known; restore it")
    trained = set(read_numbers(file, ["fold"])["id"])
    teacher = made["config"].get("teacher")
    if teacher:
        trained |= set(Fold(run.folder, 0).teacher_predictions(teacher)["id"])
    table = patches.table
    leaked = table.loc[table["id"].isin(trained) | table["pixels"].isin(trained), "id"].tolist()
    if leaked:
        raise UserError(
            f"{run.name}: was trained on {len(leaked):,} of these {len(table):,} patches ({examples(leaked)}); drop their rows",
            leaked,
        )


def _predict(folds: list[Fold], patches: Patches, labels: pd.DataFrame, config: Config, backend: Backend) -> pd.DataFrame:
    """Return `labels` with a column of probabilities for the net of each of `folds`."""
    rows = np.arange(len(labels))
    table = labels.reset_index(drop=True)
    for fold in folds:
        with fold_context(fold.number):
            net = load_best(fold, config, backend)
            table[f"fold_{fold.number}"] = predict_probabilities(net, patches, rows, config, backend, "evaluate")
    return table
