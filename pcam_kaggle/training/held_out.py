"""Predictions of a run's nets for labelled patches that none of them was trained on."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import file_sha256
from pcam_kaggle.core.logs import fold_context
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.labelled import LabelledPatches, Patches
from pcam_kaggle.data.listing import SHA1
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.evaluation import UNCHANGED, Evaluation
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.fold_state import load_best
from pcam_kaggle.training.perturb import PERTURBATIONS, Perturbed
from pcam_kaggle.training.predict import predict_probabilities
from pcam_kaggle.training.session import find_backend

log = logging.getLogger(__name__)

# With fewer patches, batch norm statistics of their own are noisy.
FEW_PATCHES = 256


def predict_labelled(
    run: Run,
    folds: list[Fold],
    patches: LabelledPatches,
    workspace: Workspace,
    evaluation: Evaluation,
    changes: Sequence[str] = (),
) -> dict[str, pd.DataFrame]:
    """Return the predictions of the nets of `run`, computed unless `evaluation` has them.

    Args:
        run: An experiment's run.
        folds: Those of its folds whose nets predict, all trained.
        patches: The patches, with labels.
        workspace: Where the run's folds were drawn.
        evaluation: Where predictions are stored.
        changes: Names of perturbations to repeat the predictions under.

    Returns:
        For `unchanged` and for each of `changes`: columns id, label, and `fold_<k>` with probabilities.

    Raises:
        UserError: A checkpoint is damaged, a probability is not a number, or `run` was trained on some of the patches.
    """
    refuse_trained(run, folds, patches, workspace)
    made = run.made_from()
    try:
        config = Config(**made["config"])
    except UserError as error:
        raise UserError(f"{run.folder}: {error}; use the version that trained it") from None
    if config.norm == "test" and len(patches.table) < FEW_PATCHES:
        log.warning(
            "%s: takes batch norm statistics from these %d patches, which are few; %d or more make scores reliable",
            run.name,
            len(patches.table),
            FEW_PATCHES,
        )
    backend = find_backend(run, config)
    sources = {
        "patches_sha256": patches.sha256,
        "checkpoints": {str(fold.number): file_sha256(fold.best_checkpoint) for fold in folds},
        "config": dataclasses.asdict(config),
        "backend": dataclasses.asdict(backend),
    }
    tables = {}
    for change in (UNCHANGED, *changes):
        perturbation = PERTURBATIONS.get(change)
        wanted = sources | {"parameters": perturbation.keywords if perturbation else {}}
        table = evaluation.predictions(run.name, change, wanted)
        log.debug("evaluate: %s, %s: %s", run.name, change, "predicts" if table is None else "up to date")
        if table is None:
            changed = Perturbed(patches, perturbation) if perturbation else patches
            table = _predict(folds, changed, patches.table[["id", "label"]], config, backend)
            evaluation.write_predictions(run.name, change, wanted, table)
        tables[change] = table
    return tables


def trained_folds(run: Run, chosen: Sequence[int] | None) -> list[Fold]:
    """Return the folds `chosen` of `run`, by default those that are trained.

    Raises:
        UserError: There is no such fold, it is not trained, or none is.
    """
    folds = {fold.number: fold for fold in run.folds()}
    unknown = [number for number in chosen or () if number not in folds]
    if unknown:
        raise UserError(f"--folds {unknown[0]}: {run.name} has folds 0 to {max(folds)}")
    trained = [number for number, fold in folds.items() if fold.is_trained]
    untrained = [number for number in chosen or () if number not in trained]
    if untrained or not trained:
        lacking = f"fold {untrained[0]} is not" if untrained else "no fold is"
        raise UserError(f"{run.folder}: {lacking} trained; train it first, or choose others with --folds")
    return [folds[number] for number in chosen or trained]


def refuse_trained(run: Run, folds: list[Fold], patches: LabelledPatches, workspace: Workspace) -> None:
    """Raise UserError if `run` was trained or validated on one of `patches`: its id, or its pixels under another id.

    For a run with a teacher this includes the test patches, whose predicted labels its `folds` were trained on. The ids are
    those of the fold file, which must therefore exist. If they are not SHA-1s, pixels cannot be compared, which is logged.
    """
    made = run.made_from()
    file = workspace.folds / f"{made['folds']}.csv"
    if not file.is_file() or file_sha256(file) != made["folds_sha256"]:
        raise UserError(f"{file}: missing or not the folds of {run.name}, so its train patches are not known; restore it")
    trained = set(read_numbers(file, ["fold"])["id"])
    teacher = made["config"].get("teacher")
    if teacher:
        trained |= {name for fold in folds for name in fold.teacher_ids(teacher)}
    if not all(SHA1.fullmatch(name) for name in trained):
        log.warning("%s: its train ids are not SHA-1s, so train patches under other names are not recognised", run.name)
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
            probabilities = predict_probabilities(net, patches, rows, config, backend, "evaluate")
        if not np.isfinite(probabilities).all():
            raise UserError(f"{fold.folder}: a probability is not a number; its net has diverged, train it again")
        table[f"fold_{fold.number}"] = probabilities
    return table
