"""Training, one fold at a time, each resumed after its last finished epoch."""

import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.logs import fold_context
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models.backbone import copy_trained
from pcam_kaggle.models.factory import create, macs
from pcam_kaggle.models.weights import weights_sha256
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.records import FoldMetrics
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training.budget import ENDLESS, Budget, Forecast
from pcam_kaggle.training.cuda_graph import fastest_step
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.distributed import broadcast, on_first_rank, one_rank_at_a_time, rank, world_size
from pcam_kaggle.training.engine import predict_logits, train_epoch
from pcam_kaggle.training.fold_state import Row, best_row, resume, save_epoch, update_files
from pcam_kaggle.training.gpus import gpu_count, loader_processes, spread_over_gpus
from pcam_kaggle.training.loader import TrainBatches, batch_bytes, batches
from pcam_kaggle.training.optim import create_optimizer
from pcam_kaggle.training.schedule import learning_rate
from pcam_kaggle.training.session import open_session
from pcam_kaggle.training.shares import Stretch, balanced
from pcam_kaggle.training.step import Learner, TrainStep
from pcam_kaggle.training.task import Task
from pcam_kaggle.training.tensorboard import Scalars

log = logging.getLogger(__name__)


def train(task: Task, chosen: list[int], budget: Budget = ENDLESS) -> None:
    """Train folds of a run until the budget ends.

    A fold writes `best.pt`, the averaged weights of the epoch with the highest validation AUC, `last.pt` to resume from,
    `log.csv` with a row per epoch and, when it is finished, `metrics.json`.

    Args:
        task: The run and what it is made from.
        chosen: Numbers of the folds to train.
        budget: Time that the session has.

    Raises:
        UserError: The config makes no net, another process works in `run`, memory is too small for a batch, a loader process
            was killed, or a loss is not finite.
    """
    run, config, store, folds = task.run, task.config, task.store, task.folds
    create(config, weights=False)
    if config.teacher:
        _check_teacher(Run(run.folder.parent / config.teacher), folds)
    with locked(run.folder) if rank() == 0 else nullcontext():
        with one_rank_at_a_time():
            loads = config.freeze > 0 or not all(run.fold(number).is_started for number in chosen)
            run.open(task.experiment, config, store, folds, weights_sha256(config) if loads else None)
            backend = open_session(run, config, store)
        log.info("train: %d of %d folds on %s", len(chosen), config.n_splits, backend)
        loaders = loader_processes(len(chosen), batch_bytes(config))
        log.debug("train: %d loader processes per training", loaders)
        done = {number: len(run.fold(number).log()) for number in chosen}
        shares = balanced(done, config.epochs, max(1, gpu_count()))
        spread_over_gpus(partial(_train_share, run, config, store, folds.table, backend, loaders, budget), shares)


def _train_share(
    run: Run,
    config: Config,
    store: PatchStore,
    table: pd.DataFrame,
    backend: Backend,
    loaders: int,
    budget: Budget,
    share: list[Stretch],
) -> None:
    """Train the epochs in `share` in order, while `budget` has time for another one and the predictions of these folds."""
    logs = [run.fold(stretch.fold).log() for stretch in share]
    seconds, valid_seconds = pd.concat(logs)[["seconds", "valid_seconds"]].max().fillna(0.0)
    passes = config.tta + (config.norm == "test")
    validations = passes * (1 + len(store.ids("test")) * config.n_splits / len(store.ids("train")))
    folds, planned = [stretch.fold for stretch in share], [stretch.until - stretch.start for stretch in share]
    forecast = Forecast(folds, planned, validations, seconds, valid_seconds)
    for index, stretch in enumerate(share):
        fold = run.fold(stretch.fold)
        with fold.lock() if stretch.is_shared else nullcontext():
            forecast.epochs_left[index] = stretch.until - len(fold.log())
            with closing(fold_epochs(fold, config, store, table, backend, loaders)) as epochs:
                is_finished = _train_stretch(epochs, stretch, config, forecast, index, budget)
        if not is_finished:
            log.info("train: out of time in fold %d; run the same command again, which resumes", fold.number)
            return


def _train_stretch(
    epochs: Iterator[Row], stretch: Stretch, config: Config, forecast: Forecast, index: int, budget: Budget
) -> bool:
    """Take the epochs of a stretch from `epochs`, while `budget` has time; return whether it had."""
    with fold_context(stretch.fold), _memory_errors(config, stretch.fold):
        while forecast.epochs_left[index] > 0:
            if broadcast(budget.left()) < forecast.seconds_to_stop(index):
                return False
            row = next(epochs, None)
            if row is None:
                return True
            forecast.add_epoch(index, row["seconds"], row["valid_seconds"])
            log.info(
                f"fold {stretch.fold}, epoch {row['epoch']:>2} of {config.epochs}: loss {row['train_loss']:.4f}, "
                f"valid AUC {row['valid_auc']:.4f}, {row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s"
            )
            if not forecast.is_logged and budget.left() < math.inf:
                log.info("train: %s", forecast.summary(budget.left()))
            forecast.is_logged = True
        if stretch.until == config.epochs:
            # Writes the result of the fold.
            next(epochs, None)
    return True


@contextmanager
def _memory_errors(config: Config, fold: int) -> Iterator[None]:
    """Raise UserError where torch reports that a batch does not fit into memory or that a loader process was killed."""
    try:
        yield
    except RuntimeError as error:
        # torch has an exception class for a GPU's memory only.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"batch_size={config.batch_size}: too large for the device's memory; use a smaller one") from None
        if "DataLoader worker (pid" in str(error):
            raise UserError(
                f"fold {fold}: a loader process was killed, perhaps for lack of memory; run the same command again, which "
                "resumes"
            ) from None
        raise


def fold_epochs(
    fold: Fold, config: Config, store: PatchStore, table: pd.DataFrame, backend: Backend, loaders: int = 1
) -> Generator[Row]:
    """Train the net of one fold on the patches of all other folds.

    Args:
        fold: The fold.
        config: Config of the run.
        store: The packed patches; those of `table` that it lacks are skipped.
        table: Columns id, label and fold.
        backend: Device, precision and memory format.
        loaders: Number of loader processes.

    Yields:
        The log's row of each epoch, after it has been written: epoch (from 1), lr, train_loss, valid_auc, images_per_second,
        and seconds and valid_seconds, the durations of the whole epoch and of its validation.

    Raises:
        UserError: The train or the validation patches lack a label, or a loss or logit is not finite.
    """
    table = table[table["id"].isin(store.ids("train"))]
    train_part, valid_part = table[table["fold"] != fold.number], table[table["fold"] == fold.number]
    if train_part["label"].nunique() < 2 or valid_part["label"].nunique() < 2:
        raise UserError(f"fold {fold.number}: without the damaged patches it has one label; replace them")
    train_rows, targets = _train_targets(fold, config, store, train_part)
    valid_rows = store.rows("train", valid_part["id"].to_numpy())
    valid_labels = valid_part["label"].to_numpy()
    data = TrainBatches(store, train_rows, targets, config, fold.number)

    torch.manual_seed(_seed(config, fold.number, 0))
    # Checkpoints lack frozen layers.
    net = backend.place(create(config, weights=not fold.is_started or config.freeze > 0))
    optimizer = create_optimizer(net, config)
    learner = Learner(net, copy_trained(net), optimizer, backend.scaler(), backend)
    rows: list[Row] = []
    if fold.is_started:
        rows = resume(learner, fold.last_checkpoint)
        log.debug("fold %d: resumes after epoch %d", fold.number, len(rows))
        on_first_rank(partial(update_files, fold, learner, rows))

    def valid_auc() -> float:
        logits = predict_logits(learner.average, store, valid_rows, config, backend, 1, "validate")[0]
        if not logits.isfinite().all():
            raise UserError(f"fold {fold.number}: a validation logit is not finite; try a smaller lr or precision=fp32")
        return auc(valid_labels, logits.double().numpy())

    step = TrainStep(learner, config, data.count)
    step.replay = fastest_step(step)
    source = batches(data, len(rows), loaders)
    with Scalars(fold.events, len(rows) + 1) if rank() == 0 else nullcontext() as scalars:
        for epoch in range(len(rows), config.epochs):
            torch.manual_seed(_seed(config, fold.number, epoch + 1) + rank())
            start = time.perf_counter()
            loss = train_epoch(step, source, data.steps, epoch, config)
            train_seconds = time.perf_counter() - start
            area = on_first_rank(valid_auc)
            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch + 1,
                "lr": learning_rate(config, epoch + 1),
                "train_loss": loss,
                "valid_auc": area,
                "seconds": round(seconds, 3),
                "valid_seconds": round(seconds - train_seconds, 3),
                "images_per_second": round(data.steps * data.count * world_size() / train_seconds, 1),
            }
            rows.append(broadcast(row))
            on_first_rank(partial(save_epoch, fold, learner, rows))
            if scalars:
                scalars.add(rows[-1])
            yield rows[-1]
    metrics = FoldMetrics(
        fold=fold.number,
        valid_auc=best_row(rows)["valid_auc"],
        epoch=int(best_row(rows)["epoch"]),
        train_patches=len(train_rows),
        valid_patches=len(valid_rows),
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        macs=macs(create(config, weights=False), config.side),
        seconds=round(sum(row["seconds"] for row in rows), 1),
        images_per_second=float(np.median([row["images_per_second"] for row in rows])),
    )
    on_first_rank(partial(fold.write_metrics, metrics))


def _train_targets(
    fold: Fold, config: Config, store: PatchStore, part: pd.DataFrame
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return rows (n,) and targets (n,) of the train patches in `part`, followed by the test patches that a teacher labels."""
    rows, targets = store.rows("train", part["id"].to_numpy()), part["label"].to_numpy(np.float64)
    if not config.teacher:
        return rows, targets
    labelled = fold.teacher_predictions(config.teacher)
    test_rows = store.rows("test", labelled["id"].to_numpy())
    return np.concatenate([rows, test_rows]), np.concatenate([targets, labelled["probability"].to_numpy()])


def _check_teacher(teacher: Run, folds: Folds) -> None:
    """Raise UserError if the teacher has other folds, since its net of a fold then saw labels of this run's validation."""
    if teacher.made_from().folds_sha256 != folds.manifest.csv_sha256:
        raise UserError(f"{teacher.folder}: the teacher has other folds; use one trained on {folds.manifest.scheme}")


def _seed(config: Config, fold: int, epoch: int) -> int:
    return int(np.random.SeedSequence((config.seed, fold, epoch)).generate_state(1)[0])
