"""Predictions of each fold's net for its validation patches (out of fold, OOF) and for the test set."""

import logging
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.logs import fold_context
from pcam_kaggle.data.labelled import Patches
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.distributed import broadcast, one_rank_at_a_time, rank, world_size
from pcam_kaggle.training.engine import adapt_norms, predict_logits
from pcam_kaggle.training.fold_state import load_best
from pcam_kaggle.training.gpus import rotated, spread_over_gpus
from pcam_kaggle.training.session import open_session
from pcam_kaggle.training.task import Task

log = logging.getLogger(__name__)


def predict(task: Task, chosen: list[int]) -> None:
    """Predict the validation part and the test set with the net of each trained fold, and write the predictions.

    Probabilities are averaged over the config's views. Each rank predicts a share of the folds.

    Args:
        task: The run and what it is made from.
        chosen: Numbers of the folds to predict.

    Raises:
        UserError: Another process works in `run`, or a checkpoint is missing or damaged.
    """
    run, config, store, folds = task.run, task.config, task.store, task.folds
    with locked(run.folder) if rank() == 0 else nullcontext():
        with one_rank_at_a_time():
            backend = open_session(run, config, store)
        share = partial(_predict_share, run, config, store, folds.table, backend)
        spread_over_gpus(share, rotated(chosen[rank() :: world_size()]))
        broadcast(None)


def _predict_share(
    run: Run, config: Config, store: PatchStore, table: pd.DataFrame, backend: Backend, share: list[int]
) -> None:
    for number in share:
        with fold_context(number):
            _predict_fold(run.fold(number), config, store, table, backend)


def _predict_fold(fold: Fold, config: Config, store: PatchStore, table: pd.DataFrame, backend: Backend) -> None:
    net = load_best(fold, config, backend)
    valid = table[(table["fold"] == fold.number) & table["id"].isin(store.ids("train"))]

    def predicted(split: str, ids: NDArray[np.object_]) -> pd.DataFrame:
        rows = store.rows(split, ids)
        return pd.DataFrame(
            {"id": ids, "probability": predict_probabilities(net, store, rows, config, backend, f"predict {split}")}
        )

    start = time.perf_counter()
    oof, test = predicted("train", valid["id"].to_numpy()), predicted("test", store.ids("test"))
    rate = round((len(oof) + len(test)) / (time.perf_counter() - start), 1)
    oof = oof.merge(valid[["id", "label"]], on="id")[["id", "label", "probability"]]
    fold.write_predictions(oof, test, store, rate)
    log.info(f"predict: fold {fold.number}, {len(oof):,} out of fold, {len(test):,} test")


def predict_probabilities(
    net: nn.Module, patches: Patches, rows: NDArray[np.int64], config: Config, backend: Backend, description: str
) -> NDArray[np.float64]:
    """Return the probabilities of patches as `config` asks for: averaged over its views, with its batch norm statistics.

    Args:
        net: Net on the device of `backend`.
        patches: The patches.
        rows: Rows of those to predict, shape (n,).
        config: Source of `side`, `tta`, `tta_shift`, `chroma_blur` and `norm`.
        backend: Device, precision and memory format.
        description: Text before the progress bar.

    Returns:
        Probabilities (n,).
    """
    if config.norm == "test":
        adapt_norms(net, patches, rows, config, backend)
    logits = predict_logits(net, patches, rows, config, backend, config.tta, description)
    return logits.double().mean(0).sigmoid().numpy()
