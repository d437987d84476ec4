"""Training, one fold at a time, each from its last finished epoch."""

import copy
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pcam_kaggle import UserError, __version__
from pcam_kaggle.config.process import hold_memory
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import locked, read_json, reading, write_csv, write_json
from pcam_kaggle.data.csv_io import read_numbers
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models import checkpoint
from pcam_kaggle.models.factory import create, create_optimizer, freeze_body, macs, weights_sha256
from pcam_kaggle.runs.provenance import commit, session_start, versions
from pcam_kaggle.runs.run import add_environment, open_run, read_environments, read_log, taught
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training.budget import ENDLESS, Budget
from pcam_kaggle.training.device import Backend, choose, device_name, find_device, loader_processes, spare_cores, spread
from pcam_kaggle.training.distributed import agreed, first, in_turn, rank, size
from pcam_kaggle.training.engine import Learner, TrainBatches, batches, learning_rate, predict_logits, train_epoch
from pcam_kaggle.training.tensorboard import Scalars


def run_backend(run: Path, config: Config, store: PatchStore) -> Backend:
    """Return the backend of the run: the one of its last session on such a device, else the one that is fastest now.

    It is added to environment.json, with the versions and the fingerprint of the patches in `store`, as this session's entry.
    """
    hold_memory()
    spare_cores()
    kind = find_device()
    used = [entry["backend"] for entry in read_environments(run) if entry["backend"]["kind"] == kind]
    with reading(run / "environment.json"):
        before = Backend(**used[-1]) if used else None
    backend = before or choose(
        lambda: create(config, weights=False), config.side, config.batch_size, config.precision, config.memory_format
    )
    environment = {
        "started": session_start(),
        "backend": dataclasses.asdict(backend),
        "device": device_name(backend.kind),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "pcam_kaggle": __version__,
        "commit": commit(),
        "packages": versions(),
        "data": {key: store.manifest[key] for key in ("train", "test", "skipped", "train_sha256", "test_sha256")},
    }
    if rank() == 0:
        add_environment(run, environment)
    return backend


def train(
    run: Path,
    experiment: str,
    config: Config,
    store: PatchStore,
    folds: Folds,
    chosen: list[int],
    budget: Budget = ENDLESS,
) -> None:
    """Train the folds in `chosen` into `run`/fold_<k>, each from its last finished epoch, until `budget` ends.

    A fold leaves `best.pt`, the averaged weights of the epoch with the highest validation AUC, `last.pt` to go on from,
    `log.csv` with a row per epoch, and `metrics.json` when it is finished.

    Raises UserError where the config makes no net, where another process works in `run`, where memory does not hold a batch,
    and where a loss is not finite.
    """
    create(config, weights=False)
    if config.teacher:
        _check_teacher(run.parent / config.teacher / "config.json", folds)
    with locked(run) if rank() == 0 else nullcontext():
        with in_turn():
            starting = not all((run / f"fold_{fold}" / "last.pt").exists() for fold in chosen)
            open_run(run, experiment, config, store, folds, weights_sha256(config) if starting else None)
            backend = run_backend(run, config, store)
        print(f"train: {len(chosen)} of {config.n_splits} folds on {backend}", flush=True)
        loaders = loader_processes(len(chosen))
        spread(partial(_train_share, run, config, store, folds.table, backend, loaders, budget), chosen)


def _train_share(
    run: Path,
    config: Config,
    store: PatchStore,
    table: pd.DataFrame,
    backend: Backend,
    loaders: int,
    budget: Budget,
    share: list[int],
) -> None:
    """Train the folds in `share`, one after the other, as long as `budget` has time for an epoch and for their predictions."""
    logs = [read_log(run / f"fold_{fold}") for fold in share]
    left = [config.epochs - len(log) for log in logs]
    seconds, valid_seconds = pd.concat(logs)[["seconds", "valid_seconds"]].max().fillna(0.0)
    views = config.tta * (1 + len(store.ids("test")) * config.n_splits / len(store.ids("train")))
    told = False
    for place, fold in enumerate(share):
        epochs = fold_epochs(run / f"fold_{fold}", config, store, table, fold, backend, loaders)
        while not left[place] or agreed(budget.left()) >= seconds + views * valid_seconds * (place + 1):
            try:
                row = next(epochs, None)
            except RuntimeError as error:
                # Of these, torch has a class of its own for a GPU's memory alone.
                if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                    raise UserError(
                        f"batch_size={config.batch_size}: the device's memory does not hold it; use a smaller one"
                    ) from None
                if "DataLoader worker (pid" in str(error):
                    raise UserError(
                        f"fold {fold}: a process that augments was killed, perhaps for want of memory; the same command goes "
                        "on from the last epoch"
                    ) from None
                raise
            if row is None:
                break
            left[place] -= 1
            seconds, valid_seconds = max(seconds, row["seconds"]), max(valid_seconds, row["valid_seconds"])
            print(
                f"fold {fold}, epoch {row['epoch']:>2} of {config.epochs}: loss {row['train_loss']:.4f}, "
                f"valid AUC {row['valid_auc']:.4f}, {row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s",
                flush=True,
            )
            if not told and budget.left() < math.inf:
                print(_forecast(share, left, seconds, views * valid_seconds, budget), flush=True)
            told = True
        else:
            print(f"train: the time is over, in fold {fold}; the same command goes on from there", flush=True)
            return


def _forecast(share: list[int], left: list[int], epoch: float, prediction: float, budget: Budget) -> str:
    """Return in words how many folds of `share`, which have `left` epochs each to go, fit into `budget`."""
    needed = np.cumsum([epochs * epoch + prediction for epochs in left])
    fit = int((needed <= budget.left()).sum())
    return (
        f"train: an epoch takes {epoch:.0f} s, a fold's predictions {prediction:.0f} s; "
        f"folds {', '.join(map(str, share))} need {needed[-1] / 60:.0f} min, {fit or 'none'} of them will be finished in the "
        f"{budget.left() / 60:.0f} min left"
    )


def fold_epochs(
    folder: Path, config: Config, store: PatchStore, table: pd.DataFrame, fold: int, backend: Backend, loaders: int = 1
) -> Iterator[dict[str, float]]:
    """Train the net of `fold` on the patches of all other folds in `table` that the store holds, by `loaders` processes.

    Yields the log's row after each epoch, when it is on the disk: epoch, lr, train_loss, valid_auc, images_per_second and,
    of the whole epoch and of its validation, seconds and valid_seconds.

    Raises UserError where one of the two parts lacks a label.
    """
    table = table[table["id"].isin(store.ids("train"))]
    train_part, valid_part = table[table["fold"] != fold], table[table["fold"] == fold]
    if train_part["label"].nunique() < 2 or valid_part["label"].nunique() < 2:
        raise UserError(f"fold {fold}: without the damaged patches it lacks a label; mend them")
    train_rows = store.rows("train", train_part["id"].to_numpy())
    valid_rows = store.rows("train", valid_part["id"].to_numpy())
    valid_labels = valid_part["label"].to_numpy()
    targets = train_part["label"].to_numpy(np.float64)
    if config.teacher:
        labelled = read_numbers(taught(folder.parent, config, fold), ["probability"])
        train_rows = np.concatenate([train_rows, store.rows("test", labelled["id"].to_numpy())])
        targets = np.concatenate([targets, labelled["probability"].to_numpy()])
    data = TrainBatches(store, train_rows, targets, config, fold)

    last = folder / "last.pt"
    torch.manual_seed(_seed(config, fold, 0))
    net = backend.place(create(config, weights=not last.exists()))
    optimizer = create_optimizer(net, config)
    learner = Learner(net, copy.deepcopy(net), optimizer, backend.scaler(), backend)
    log: list[dict[str, float]] = []
    if last.exists():
        log = _resume(learner, last)
        first(partial(_keep, folder, learner, log))

    def valid_auc() -> float:
        logits = predict_logits(learner.average, store, valid_rows, config, backend, 1, "validate")[0]
        if not logits.isfinite().all():
            raise UserError(f"fold {fold}: a validation logit is not finite; try a smaller lr or precision=fp32")
        return auc(valid_labels, logits.double().numpy())

    source = batches(data, len(log), loaders)
    with Scalars(folder / "events", len(log) + 1) if rank() == 0 else nullcontext() as scalars:
        for epoch in range(len(log), config.epochs):
            torch.manual_seed(_seed(config, fold, epoch + 1) + rank())
            freeze_body(net, optimizer.param_groups, frozen=epoch < config.head_epochs)
            start = time.perf_counter()
            loss = train_epoch(learner, source, data.steps, epoch, config)
            train_seconds = time.perf_counter() - start
            area = first(valid_auc)
            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch + 1,
                "lr": learning_rate(config, epoch + 1),
                "train_loss": loss,
                "valid_auc": area,
                "seconds": round(seconds, 3),
                "valid_seconds": round(seconds - train_seconds, 3),
                "images_per_second": round(data.steps * data.count * size() / train_seconds, 1),
            }
            log.append(agreed(row))
            first(lambda: _save(folder, learner, log, scalars))
            yield log[-1]
    metrics = {
        "fold": fold,
        "valid_auc": _best(log)["valid_auc"],
        "epoch": _best(log)["epoch"],
        "train_patches": len(train_rows),
        "valid_patches": len(valid_rows),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "macs": macs(create(config, weights=False), config.side),
        "seconds": round(sum(row["seconds"] for row in log), 1),
        "images_per_second": float(np.median([row["images_per_second"] for row in log])),
    }
    first(partial(write_json, folder / "metrics.json", metrics))


def _check_teacher(file: Path, folds: Folds) -> None:
    """Raise UserError where the teacher's folds are others: its net of a fold has then seen labels that this one must not."""
    if read_json(file, folds_sha256=str)["folds_sha256"] != folds.manifest["csv_sha256"]:
        raise UserError(f"{file}: the teacher has other folds; use one that was trained on {folds.manifest['scheme']}")


def load_best(folder: Path, config: Config, backend: Backend) -> nn.Module:
    """Return the net of the fold in `folder` with its best weights, in evaluation mode on the backend."""
    content = checkpoint.load(folder / "best.pt", "net")
    net = create(config, weights=False)
    with reading(folder / "best.pt", checkpoint.ANEW):
        net.load_state_dict(content["net"])
    return backend.place(net).eval()


def _best(log: list[dict[str, float]]) -> dict[str, float]:
    return max(log, key=lambda row: row["valid_auc"])


def _save(folder: Path, learner: Learner, log: list[dict[str, float]], scalars: Scalars) -> None:
    checkpoint.save(folder / "last.pt", _state(learner, log))
    _keep(folder, learner, log)
    scalars.add(log[-1])


def _keep(folder: Path, learner: Learner, log: list[dict[str, float]]) -> None:
    """Bring `best.pt` and `log.csv` up to the epoch that `last.pt` holds, also after a stop between these writes."""
    if _best(log) is log[-1]:
        content = {"net": learner.average.state_dict(), "epoch": len(log), "valid_auc": log[-1]["valid_auc"]}
        checkpoint.save(folder / "best.pt", content)
    elif checkpoint.load(folder / "best.pt", "epoch")["epoch"] != _best(log)["epoch"]:
        raise UserError(f"{folder / 'best.pt'}: not the best epoch of last.pt; delete {folder} to train the fold anew")
    write_csv(folder / "log.csv", pd.DataFrame(log))


def _seed(config: Config, fold: int, epoch: int) -> int:
    return int(np.random.SeedSequence((config.seed, fold, epoch)).generate_state(1)[0])


def _state(learner: Learner, log: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "net": learner.net.state_dict(),
        "average": learner.average.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "log": json.dumps(log),
    }


def _resume(learner: Learner, last: Path) -> list[dict[str, float]]:
    state = checkpoint.load(last, "net", "average", "optimizer", "scaler", "log")
    with reading(last, checkpoint.ANEW):
        learner.net.load_state_dict(state["net"])
        learner.average.load_state_dict(state["average"])
        learner.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and learner.scaler.is_enabled():
            learner.scaler.load_state_dict(state["scaler"])
    return checkpoint.read_log(last, state)
