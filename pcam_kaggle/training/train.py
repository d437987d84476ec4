"""Training, one fold at a time, each resumed after its last finished epoch."""

import logging
import math
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from functools import partial

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pcam_kaggle.core.config import PATCH_SIDE, Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.process import rank
from pcam_kaggle.models.factory import create, macs
from pcam_kaggle.models.weights import weights_sha256
from pcam_kaggle.runs.records import FoldMetrics
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc, cross_entropy
from pcam_kaggle.training.budget import ENDLESS, Budget, Forecast
from pcam_kaggle.training.cuda_graph import fastest_step
from pcam_kaggle.training.device import Backend, choose_backend, configure_torch, device_name, memory_errors
from pcam_kaggle.training.distributed import broadcast, on_first_rank, world_size
from pcam_kaggle.training.embed import mean_features
from pcam_kaggle.training.engine import PREDICT_BATCH, predict_logits, train_epoch
from pcam_kaggle.training.gpus import Segment, assign_epochs, loader_processes, run_on_gpus
from pcam_kaggle.training.learner import EpochRow, Learner, best_row
from pcam_kaggle.training.loader import TrainBatches, batches
from pcam_kaggle.training.schedule import learning_rate
from pcam_kaggle.training.task import Task, open_session
from pcam_kaggle.training.teacher import check_teacher, load_teacher

log = logging.getLogger(__name__)


def train(task: Task, folds: list[int], budget: Budget = ENDLESS) -> None:
    """Train `folds` of a run until the budget ends; every rank calls this."""
    run, config, manifest = task.run, task.config, task.folds.manifest
    create(config, weights=False)
    if config.teacher:
        check_teacher(Run(run.folder.parent / config.teacher), config, manifest)
    configure_torch()
    with locked(run.folder) if rank() == 0 else nullcontext():
        backend = on_first_rank(partial(_open, task, folds))
        loaders = loader_processes(len(folds))
        log.info("train: %d of %d folds on %s", len(folds), config.n_splits, backend)
        log.debug("train: %d loader processes per training", loaders)
        done = {number: len(run.fold(number).log()) for number in folds}
        assignments = assign_epochs(done, config.epochs, max(1, torch.cuda.device_count()))
        run_on_gpus(partial(_train_segments, task, backend, loaders, budget), assignments)


def _open(task: Task, folds: list[int]) -> Backend:
    reads_weights = task.config.freeze > 0 or not all(task.run.fold(number).is_started for number in folds)
    weights = weights_sha256(task.config) if reads_weights else None
    task.run.open(task.experiment, task.config, task.store, task.folds, weights)
    return open_session(task)


def _train_segments(task: Task, backend: Backend, loaders: int, budget: Budget, segments: list[Segment]) -> None:
    """Train `segments` in order, while `budget` has time for another epoch and the predictions of these folds."""
    forecast, session = _forecast(task, backend, segments), list[EpochRow]()
    left = forecast.epochs_left
    for segment in segments:
        number, fold = segment.fold, task.run.fold(segment.fold)
        with (
            fold.lock() if segment.is_split else nullcontext(),
            memory_errors(f"batch_size={task.config.batch_size}"),
            closing(train_fold(task, number, backend, loaders)) as rows,
        ):
            left[number] = segment.until - len(fold.log())
            while left[number] > 0:
                if broadcast(budget.left()) < forecast.seconds_to_stop(number):
                    log.info("train: out of time in fold %d; run the same command again, which resumes", number)
                    return
                row = next(rows, None)
                if row is None:
                    break
                left[number] -= 1
                session.append(row)
                forecast.epoch_seconds = max(each["seconds"] for each in session)
                forecast.valid_seconds = max(each["valid_seconds"] for each in session)
                log.info(
                    f"fold {number}, epoch {row['epoch']:>2} of {task.config.epochs}: loss {row['train_loss']:.4f}, "
                    f"valid AUC {row['valid_auc']:.4f}, {row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s"
                )
                if len(session) == 1 and budget.left() < math.inf:
                    log.info("train: %s", forecast.summary(budget.left()))
            if segment.until == task.config.epochs:
                # Writes metrics.json.
                next(rows, None)


def _forecast(task: Task, backend: Backend, segments: list[Segment]) -> Forecast:
    # A log does not tell which session's device an epoch was trained on.
    is_one_device = {entry.device for entry in task.run.environments()} <= {device_name(backend.kind)}
    logs = pd.concat([task.run.fold(segment.fold).log() for segment in segments])
    seconds, valid_seconds = logs[["seconds", "valid_seconds"]].max().fillna(0.0) * is_one_device
    passes = task.config.tta + (task.config.norm == "test")
    validations = passes * (1 + len(task.store.ids("test")) * task.config.n_splits / len(task.store.ids("train")))
    epochs_left = {segment.fold: segment.until - segment.start for segment in segments}
    return Forecast(epochs_left, validations, seconds, valid_seconds)


def train_fold(task: Task, number: int, backend: Backend, loaders: int = 1) -> Generator[EpochRow]:
    """Train the model of fold `number` on all other folds; yield the log's row of each epoch, after it has been written."""
    config = task.config
    data = FoldData(task, number)
    learner, rows = _start(task, number, backend, data.train.count)
    source = batches(data.train, len(rows), loaders)
    for epoch in range(len(rows), config.epochs):
        torch.manual_seed(_seed(config, number, epoch + 1) + rank())
        start = time.perf_counter()
        loss = train_epoch(learner, source, data.train.steps, epoch, config)
        seconds = time.perf_counter() - start
        rows.append(on_first_rank(partial(_finish_epoch, task, data, learner, rows, loss, seconds)))
        yield rows[-1]
    on_first_rank(partial(_write_metrics, task, data, learner, rows))


class FoldData:
    """Train batches of a fold, with a teacher also of test patches, and rows and labels (n,) of its validation patches."""

    def __init__(self, task: Task, number: int) -> None:
        store, (train, valid) = task.store, task.parts(number)
        rows, targets = store.rows("train", train["id"].to_numpy()), train["label"].to_numpy(np.float64)
        if task.config.teacher:
            rows = np.concatenate([rows, store.rows("test", store.ids("test"))])
            # Replaced by what the teacher says of each augmented patch.
            targets = np.full(len(rows), np.nan)
        self.train = TrainBatches(store, rows, targets, task.config, number)
        self.valid_rows, self.valid_labels = store.rows("train", valid["id"].to_numpy()), valid["label"].to_numpy()


def _start(task: Task, number: int, backend: Backend, count: int) -> tuple[Learner, list[EpochRow]]:
    config, fold = task.config, task.run.fold(number)
    torch.manual_seed(_seed(config, number, 0))
    # Checkpoints lack frozen layers.
    model = backend.place(create(config, weights=not fold.is_started or config.freeze > 0))
    learner = Learner(model, config, backend, count, load_teacher(task, number, backend) if config.teacher else None)
    rows = learner.resume(fold.last_checkpoint) if fold.is_started else []
    if rows:
        log.debug("fold %d: resumes after epoch %d", number, len(rows))
        on_first_rank(partial(learner.save_best, fold, rows))
    learner.replay = fastest_step(learner)
    return learner, rows


def _finish_epoch(
    task: Task, data: FoldData, learner: Learner, rows: list[EpochRow], loss: float, train_seconds: float
) -> EpochRow:
    config, train, epoch = task.config, data.train, len(rows) + 1
    fold = task.run.fold(train.fold)
    start = time.perf_counter()
    (logits,) = predict_logits(learner.ema, task.store, data.valid_rows, config, learner.backend, 1, "validate")
    if not logits.isfinite().all():
        raise UserError(f"fold {train.fold}: a validation logit is not finite; try a smaller lr or precision=fp32")
    values = logits.double().numpy()
    valid_auc, valid_seconds = auc(data.valid_labels, values), time.perf_counter() - start
    row = EpochRow(
        epoch=epoch,
        lr=learning_rate(config, epoch),
        train_loss=loss,
        valid_auc=valid_auc,
        valid_loss=cross_entropy(data.valid_labels, values),
        seconds=round(train_seconds + valid_seconds, 3),
        valid_seconds=round(valid_seconds, 3),
        images_per_second=round(train.steps * train.count * world_size() / train_seconds, 1),
        loader_wait=round(learner.waited / train_seconds, 3),
    )
    learner.save(fold, [*rows, row])
    return row


def _write_metrics(task: Task, data: FoldData, learner: Learner, rows: list[EpochRow]) -> None:
    best = best_row(rows)
    metrics = FoldMetrics(
        fold=data.train.fold,
        valid_auc=best["valid_auc"],
        epoch=best["epoch"],
        parameters=sum(parameter.numel() for parameter in learner.model.parameters()),
        macs=macs(create(task.config, weights=False), task.config.side),
        seconds=round(sum(row["seconds"] for row in rows), 1),
        images_per_second=float(np.median([row["images_per_second"] for row in rows])),
        loader_wait=rows[-1].get("loader_wait"),
        steps=learner.steps,
    )
    task.run.fold(data.train.fold).write_metrics(metrics)


def _seed(config: Config, fold: int, epoch: int) -> int:
    return int(np.random.SeedSequence((config.seed, fold, epoch)).generate_state(1)[0])


class _RandomPatches:
    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, (len(rows), PATCH_SIDE, PATCH_SIDE, 3), np.uint8)


def rehearse(config: Config) -> None:
    """Take a step of training on random patches and predict a batch, or embed one for a probe; every rank calls this.

    Nothing is written or drawn. Raises UserError if the config makes no model, or it does not fit into the device's memory.
    """
    configure_torch()
    backend = choose_backend(config.precision)
    with torch.random.fork_rng(range(torch.cuda.device_count())), memory_errors(f"model={config.model}"):
        _rehearse(config, backend)
    if backend.kind == "cuda":
        # The processes of the GPUs need the memory.
        torch.cuda.empty_cache()


def _rehearse(config: Config, backend: Backend) -> None:
    patches, rows = _RandomPatches(), np.arange(PREDICT_BATCH)
    model = backend.place(create(config))
    if config.probe:
        mean_features(model.eval(), patches, rows, config, backend)
        return
    learner = Learner(model, config, backend, config.batch_size // world_size())
    with memory_errors(f"batch_size={config.batch_size}"):
        batch = torch.randint(0, 256, learner.patches.shape, dtype=torch.uint8)
        learner.load(batch, torch.ones(len(batch)), config.lr, 1.0)
        learner.step()
    predict_logits(learner.ema.eval(), patches, rows, config, backend, 1, "rehearse")
