"""A logistic regression per fold on the features of a frozen model, written like the result of a training."""

import logging
import time
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked
from pcam_kaggle.models.backbone import Backbone, trained_state
from pcam_kaggle.models.factory import create, macs
from pcam_kaggle.models.weights import weights_sha256
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.records import FoldMetrics
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training.budget import ENDLESS, Budget
from pcam_kaggle.training.distributed import world_size
from pcam_kaggle.training.embed import Features, embed
from pcam_kaggle.training.task import Task, open_session

log = logging.getLogger(__name__)
# Weights of half the squared norm of the coefficients, relative to the mean loss; each fit starts from the one before.
PENALTIES = np.logspace(0, -5, 11)
# Patches that a penalty is chosen with, and iterations of a fit, at most.
CHOSEN_WITH, MAX_ITERATIONS = 20_000, 1000


def probe(task: Task, folds: list[int], budget: Budget = ENDLESS) -> None:
    """Fit the classifiers of `folds` on features that are computed once for all, unless the budget ends, and predict."""
    if world_size() > 1:
        raise UserError("probe=true: uses all GPUs by itself; run it without torchrun")
    run, config = task.run, task.config
    net = create(config, weights=False)
    assert isinstance(net, Backbone)
    # Refused before the hours of embedding, unless it is a single linear layer.
    net.classifier()
    with locked(run.folder):
        run.open(task.experiment, config, task.store, task.folds, weights_sha256(config))
        backend = open_session(task)
        log.info("train: %d of %d folds on %s", len(folds), config.n_splits, backend)
        embedded = embed(config, task.store, backend, budget)
        if embedded is None:
            log.info("train: out of time while embedding; run the same command again, which resumes")
            return
        for number in folds:
            _fit_fold(task, number, *embedded, net)


def _fit_fold(task: Task, number: int, features: Features, images_per_second: float, net: Backbone) -> None:
    start = time.perf_counter()
    fold, (train, valid) = task.run.fold(number), task.parts(number)
    ids = pd.Index(task.store.ids("train"))
    x, labels = features["train"][ids.get_indexer(train["id"])], train["label"].to_numpy()
    penalty = choose_penalty(x, labels, train["fold"].to_numpy())
    # Rounded as in the checkpoint.
    weight, bias = (np.float32(part) for part in fit(x, labels, [penalty])[0])

    def logits(x: NDArray[np.float32]) -> NDArray[np.float64]:
        return x.astype(np.float64) @ weight + bias

    valid_logits = logits(features["train"][ids.get_indexer(valid["id"])])
    valid_auc = auc(valid["label"].to_numpy(), valid_logits)
    # The classifier, the only part that is not frozen, has a matrix and a vector.
    state = {
        name: torch.tensor(weight if tensor.ndim > 1 else bias).reshape(tensor.shape)
        for name, tensor in trained_state(net).items()
    }
    checkpoint.save(fold.best_checkpoint, {"net": state, "epoch": 0, "valid_auc": valid_auc})
    embedding_seconds = sum(map(len, features.values())) / images_per_second / task.config.n_splits
    metrics = FoldMetrics(
        fold=number,
        valid_auc=valid_auc,
        penalty=penalty,
        parameters=sum(p.numel() for p in net.parameters()),
        macs=macs(net, task.config.side),
        seconds=round(time.perf_counter() - start + embedding_seconds, 1),
        images_per_second=images_per_second,
    )
    fold.write_metrics(metrics)
    oof = valid[["id", "label"]].assign(probability=expit(valid_logits))
    test = pd.DataFrame({"id": task.store.ids("test"), "probability": expit(logits(features["test"]))})
    fold.write_predictions(oof, test, task.store, images_per_second)
    log.info("fold %d: penalty %.2g, valid AUC %.4f", number, penalty, valid_auc)


def choose_penalty(features: NDArray[np.float32], labels: NDArray[np.int64], folds: NDArray[np.int64]) -> float:
    """Return the penalty with the highest mean AUC over `folds` (n,), each predicted by a fit on the others' patches."""
    rng = np.random.default_rng(0)
    areas = []
    for number in np.unique(folds):
        is_held_out = folds == number
        fitted, scored = (rng.permutation(np.flatnonzero(part))[:CHOSEN_WITH] for part in (~is_held_out, is_held_out))
        held_out, fits = features[scored].astype(np.float64), fit(features[fitted], labels[fitted], PENALTIES)
        areas.append([auc(labels[scored], held_out @ weight + bias) for weight, bias in fits])
    return float(PENALTIES[int(np.argmax(np.mean(areas, axis=0)))])


def fit(
    features: NDArray[np.float32], labels: NDArray[np.int64], penalties: Iterable[float]
) -> list[tuple[NDArray[np.float64], float]]:
    """Fit a logistic regression of `labels` (n,), 0 or 1, on standardised `features` (n, features).

    For each penalty, as in `PENALTIES`, return coefficients (features,) and intercept for features that are not standardised.
    """
    # It sums in float64, and leaves a feature that never changes at 0.
    scaler = StandardScaler(copy=False)
    x = scaler.fit_transform(features.astype(np.float32))
    model, found = LogisticRegression(warm_start=True, max_iter=MAX_ITERATIONS), []
    for penalty in penalties:
        model.set_params(C=1 / (penalty * len(x))).fit(x, labels)
        weight = model.coef_[0].astype(np.float64) / scaler.scale_
        found.append((weight, float(model.intercept_[0] - weight @ scaler.mean_)))
    return found
