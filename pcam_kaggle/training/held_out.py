"""Predictions of a run's models for a held-out set, on which none of them was trained."""

import dataclasses
import logging

import numpy as np
import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import file_sha256
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.labelled import LabelledPatches
from pcam_kaggle.data.listing import SHA1
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.records import HeldOutSources
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend, find_backend
from pcam_kaggle.training.learner import load_best
from pcam_kaggle.training.predict import predict_probabilities

log = logging.getLogger(__name__)
# With fewer patches, batch norm statistics of their own are noisy.
FEW_PATCHES = 256


def predict_held_out(
    run: Run, folds: list[Fold], patches: LabelledPatches, workspace: Workspace, evaluation: Evaluation
) -> pd.DataFrame:
    """Return the predictions for a held-out set by the models of `folds`, all trained, computed unless `evaluation` has them.

    The columns are id, label, and `fold_<k>` with probabilities. `workspace` has the folds of `run`.
    """
    refuse_trained(run, folds, patches, workspace)
    config = run.config()
    if config.norm == "test" and (count := len(patches.table)) < FEW_PATCHES:
        statistics = f"takes batch norm statistics from these {count} patches, which are few"
        log.warning("%s: %s; %d or more make scores reliable", run.name, statistics, FEW_PATCHES)
    backend = find_backend(run, config)
    sources = HeldOutSources(
        patches_sha256=patches.sha256,
        checkpoints={fold.number: file_sha256(fold.best_checkpoint) for fold in folds},
        config=dataclasses.asdict(config),
        backend=backend.record(),
    )
    table = evaluation.predictions(run.name, sources)
    log.debug("evaluate: %s: %s", run.name, "predicts" if table is None else "up to date")
    if table is None:
        table = _predict(folds, patches, config, backend)
        evaluation.write_predictions(run.name, sources, table)
    return table


def predict_unlabelled(run: Run, folds: list[Fold], patches: LabelledPatches, workspace: Workspace) -> pd.DataFrame:
    """Return what `predict_held_out` does, without labels, but only warn of train patches, and predict few with norm=train."""
    try:
        refuse_trained(run, folds, patches, workspace)
    except UserError as error:
        log.warning("%s", error)
    config = run.config()
    if config.norm == "test" and len(patches.table) < FEW_PATCHES:
        log.warning("%s: predicts with norm=train, since there are fewer than %d patches", run.name, FEW_PATCHES)
        config = dataclasses.replace(config, norm="train")
    return _predict(folds, patches, config, find_backend(run, config))


def _predict(folds: list[Fold], patches: LabelledPatches, config: Config, backend: Backend) -> pd.DataFrame:
    table, rows = patches.table.drop(columns="pixels"), np.arange(len(patches.table))
    for fold in folds:
        model = load_best(fold, config, backend)
        probabilities = predict_probabilities(model, patches, rows, config, backend, "evaluate")
        if not np.isfinite(probabilities).all():
            raise UserError(f"{fold.folder}: a probability is not a number; its model has diverged, train it again")
        table[f"fold_{fold.number}"] = probabilities
    return table


def refuse_trained(run: Run, folds: list[Fold], patches: LabelledPatches, workspace: Workspace) -> None:
    """Raise UserError if `run` was trained or validated on one of `patches`: its id, or its pixels under another id.

    The ids are those of the fold file, which must exist, and with a teacher those of the test patches, which it labelled.
    """
    made = run.made_from()
    file = workspace.folds / f"{made.folds}.csv"
    if not file.is_file() or file_sha256(file) != made.folds_sha256:
        raise UserError(f"{file}: missing or not the folds of {run.name}, so its train patches are not known; restore it")
    trained = set(read_numbers(file, ["fold"])["id"])
    if made.config.get("teacher"):
        trained |= {name for fold in folds for name in fold.predictions()[1]["id"]}
    if not all(SHA1.fullmatch(name) for name in trained):
        log.warning("%s: its train ids are not SHA-1s, so train patches under other names are not recognised", run.name)
    table = patches.table
    leaked = table.loc[table["id"].isin(trained) | table["pixels"].isin(trained), "id"].tolist()
    if leaked:
        raise UserError(
            f"{run.name}: was trained on {len(leaked):,} of these {len(table):,} patches ({examples(leaked)}); leave them out",
            leaked,
        )
