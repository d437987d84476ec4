"""Predictions of each fold's model for its validation patches (out of fold, OOF) and for the test set."""

import logging
import time
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.files import locked
from pcam_kaggle.data.labelled import Patches
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.distributed import on_first_rank
from pcam_kaggle.training.engine import adapt_norms, predict_logits
from pcam_kaggle.training.gpus import round_robin, run_on_gpus
from pcam_kaggle.training.learner import load_best
from pcam_kaggle.training.task import Task, open_session

log = logging.getLogger(__name__)


def predict(task: Task, folds: list[int]) -> None:
    """Predict validation part and test set with the models of `folds`, in rank 0 on all its GPUs; every rank calls this."""

    def work() -> None:
        with locked(task.run.folder):
            run_on_gpus(partial(_predict_folds, task, open_session(task)), round_robin(folds))

    on_first_rank(work)


def _predict_folds(task: Task, backend: Backend, folds: list[int]) -> None:
    config, store = task.config, task.store
    for number in folds:
        fold, (_, valid) = task.run.fold(number), task.parts(number)
        net = load_best(fold, config, backend)
        start = time.perf_counter()
        tables = []
        for split, ids in (("train", valid["id"].to_numpy()), ("test", store.ids("test"))):
            rows = store.rows(split, ids)
            probabilities = predict_probabilities(net, store, rows, config, backend, f"predict {split}")
            tables.append(pd.DataFrame({"id": ids, "probability": probabilities}))
        oof, test = tables
        rate = round((len(oof) + len(test)) / (time.perf_counter() - start), 1)
        oof = oof.merge(valid[["id", "label"]], on="id")[["id", "label", "probability"]]
        fold.write_predictions(oof, test, store, rate)
        log.info(f"predict: fold {number}, {len(oof):,} out of fold, {len(test):,} test")


def predict_probabilities(
    net: nn.Module, patches: Patches, rows: NDArray[np.int64], config: Config, backend: Backend, description: str
) -> NDArray[np.float64]:
    """Return the probabilities (n,) of the patches in `rows` (n,), means over views, under `net`, which is on the device."""
    if config.norm == "test":
        adapt_norms(net, patches, rows, config, backend)
    logits = predict_logits(net, patches, rows, config, backend, config.tta, description)
    return logits.double().mean(0).sigmoid().numpy()
