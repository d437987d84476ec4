"""A logistic regression per fold on the features of a frozen net, written like the result of a training."""

import logging
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models.backbone import Backbone, trained_state
from pcam_kaggle.models.factory import create, macs
from pcam_kaggle.models.weights import weights_sha256
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.records import FoldMetrics
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training.budget import ENDLESS, Budget
from pcam_kaggle.training.distributed import world_size
from pcam_kaggle.training.embed import embed
from pcam_kaggle.training.session import open_session
from pcam_kaggle.training.task import Task

log = logging.getLogger(__name__)

# Weights of half the squared norm of the coefficients, relative to the mean loss; each fit starts from the one before.
PENALTIES = np.logspace(0, -5, 11)
# Patches that a penalty is chosen with, at most.
CHOSEN_WITH = 20_000
MAX_ITERATIONS = 1000


@dataclass(frozen=True, slots=True)
class Features:
    """Features of all patches.

    Attributes:
        train: (n, features), in the order of the rows of `table`.
        table: Columns id, label and fold.
        test: (m, features).
        test_ids: Ids of the test patches.
        images_per_second: Rate at which they were computed.
    """

    train: NDArray[np.float16]
    table: pd.DataFrame
    test: NDArray[np.float16]
    test_ids: NDArray[np.object_]
    images_per_second: float

    @property
    def seconds(self) -> float:
        """Duration of their computation at this rate."""
        return (len(self.train) + len(self.test)) / self.images_per_second


def probe(task: Task, chosen: list[int], budget: Budget = ENDLESS) -> None:
    """Fit the classifiers of folds of a run on features that are computed once for all folds, and predict.

    A fold writes `best.pt` with the classifier alone, `metrics.json` and its predictions.

    Args:
        task: The run and what it is made from, with `probe=true`.
        chosen: Numbers of the folds.
        budget: Time that the session has.

    Raises:
        UserError: The config makes no net with a linear classifier, torchrun has started several ranks, a fold has one
            label, or another process works in `run`.
    """
    run, config, store, folds = task.run, task.config, task.store, task.folds
    if world_size() > 1:
        raise UserError("probe=true: uses all GPUs by itself; run it without torchrun")
    net = create(config, weights=False)
    assert isinstance(net, Backbone)
    classifier, names = net.classifier(), tuple(trained_state(net))
    size = {"parameters": sum(p.numel() for p in net.parameters()), "macs": macs(net, config.side)}
    shapes = {name: getattr(classifier, name.rpartition(".")[2]).shape for name in names}
    # A second net, with the weights, is created for the features.
    del net, classifier
    with locked(run.folder):
        run.open(task.experiment, config, store, folds, weights_sha256(config))
        backend = open_session(run, config, store)
        log.info("train: %d of %d folds on %s", len(chosen), config.n_splits, backend)
        embedded = embed(config, store, backend, budget)
        if embedded is None:
            log.info("train: out of time while embedding; run the same command again, which resumes")
            return
        arrays, rate = embedded
        table = pd.DataFrame({"id": store.ids("train")}).merge(folds.table, on="id", how="left", validate="1:1")
        features = Features(arrays["train"], table, arrays["test"], store.ids("test"), rate)
        for number in chosen:
            _fit_fold(run.fold(number), features, store, config.n_splits, size, shapes)


def _fit_fold(
    fold: Fold, features: Features, store: PatchStore, n_splits: int, size: dict[str, int], shapes: dict[str, torch.Size]
) -> None:
    start = time.perf_counter()
    table = features.table
    is_train, is_valid = (table["fold"] != fold.number) & table["fold"].notna(), table["fold"] == fold.number
    train, valid = np.flatnonzero(is_train), np.flatnonzero(is_valid)
    if table.loc[is_train, "label"].nunique() < 2 or table.loc[is_valid, "label"].nunique() < 2:
        raise UserError(f"fold {fold.number}: without the damaged patches it has one label; replace them")
    labels, numbers = table["label"].fillna(0).to_numpy(np.int64), table["fold"].to_numpy(np.float64)
    penalty = choose_penalty(features.train, labels, numbers, train)
    weight, bias = fit(features.train[train], labels[train], [penalty])[0]

    def logits(x: NDArray[np.float16]) -> NDArray[np.float64]:
        return x.astype(np.float64) @ weight + bias

    area = auc(labels[valid], logits(features.train[valid]))
    state = {name: torch.tensor(weight if len(shape) > 1 else bias).float().reshape(shape) for name, shape in shapes.items()}
    checkpoint.save(fold.best_checkpoint, {"net": state, "epoch": 0, "valid_auc": area})
    metrics = FoldMetrics(
        fold=fold.number,
        valid_auc=area,
        penalty=penalty,
        train_patches=len(train),
        valid_patches=len(valid),
        **size,
        # The embedding serves all folds.
        seconds=round(time.perf_counter() - start + features.seconds / n_splits, 1),
        images_per_second=features.images_per_second,
    )
    fold.write_metrics(metrics)
    oof = table.loc[valid, ["id", "label"]].astype({"label": np.int64})
    oof["probability"] = expit(logits(features.train[valid]))
    test = pd.DataFrame({"id": features.test_ids, "probability": expit(logits(features.test))})
    fold.write_predictions(oof, test, store, features.images_per_second)
    log.info("fold %d: penalty %.2g, valid AUC %.4f", fold.number, penalty, area)


def choose_penalty(
    features: NDArray[np.float16], labels: NDArray[np.int64], folds: NDArray[np.float64], train: NDArray[np.int64]
) -> float:
    """Return the penalty with the highest mean AUC over the folds of the train part, each predicted by a fit on the others.

    Args:
        features: Of all patches, shape (n, features).
        labels: 0 or 1, shape (n,).
        folds: Number of the fold of each patch, shape (n,).
        train: Rows of the train part.
    """
    rng = np.random.default_rng(0)
    areas = []
    for number in np.unique(folds[train]):
        is_held_out = folds[train] == number
        fitted, scored = (rng.permutation(part)[:CHOSEN_WITH] for part in (train[~is_held_out], train[is_held_out]))
        held_out, fits = features[scored].astype(np.float64), fit(features[fitted], labels[fitted], PENALTIES)
        areas.append([auc(labels[scored], held_out @ weight + bias) for weight, bias in fits])
    return float(PENALTIES[int(np.argmax(np.mean(areas, axis=0)))])


def fit(
    features: NDArray[np.float16], labels: NDArray[np.int64], penalties: NDArray[np.float64] | list[float]
) -> list[tuple[NDArray[np.float64], float]]:
    """Fit a logistic regression for each penalty on standardised features.

    Args:
        features: Shape (n, features).
        labels: 0 or 1, shape (n,).
        penalties: Weights of half the squared norm of the coefficients, relative to the mean loss over patches.

    Returns:
        For each penalty, coefficients (features,) and intercept for features that are not standardised.
    """
    x = features.astype(np.float32)
    mean, deviation = x.mean(0), x.std(0)
    # A feature that never changes says nothing; its standardised value is 0.
    deviation[deviation == 0] = 1
    x = (x - mean) / deviation
    model = LogisticRegression(warm_start=True, max_iter=MAX_ITERATIONS)
    found = []
    for penalty in penalties:
        model.set_params(C=1 / (penalty * len(x))).fit(x, labels)
        weight = model.coef_[0].astype(np.float64) / deviation
        found.append((weight, float(model.intercept_[0] - weight @ mean)))
    return found
