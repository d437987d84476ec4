"""The state of a fold's training on disk: checkpoints and log."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import reading
from pcam_kaggle.models.backbone import trained_state
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import weights_sha256
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.optim import load_optimizer
from pcam_kaggle.training.step import Learner

# A row of log.csv: epoch, lr, train_loss, valid_auc, seconds, valid_seconds and images_per_second.
Row = dict[str, float]


def best_row(rows: list[Row]) -> Row:
    """Return the row of the epoch with the highest validation AUC, the first of equals."""
    return max(rows, key=lambda row: row["valid_auc"])


def save_epoch(fold: Fold, learner: Learner, rows: list[Row]) -> None:
    """Write the state after the last epoch of `rows` to the fold's folder."""
    checkpoint.save(fold.last_checkpoint, _state(learner, rows))
    update_files(fold, learner, rows)


def update_files(fold: Fold, learner: Learner, rows: list[Row]) -> None:
    """Update best checkpoint and log to the epoch of the last checkpoint, also after an interruption between these writes."""
    best = fold.best_checkpoint
    if best_row(rows) is rows[-1]:
        content = {"net": trained_state(learner.average), "epoch": len(rows), "valid_auc": rows[-1]["valid_auc"]}
        checkpoint.save(best, content)
    elif checkpoint.load(best, "epoch")["epoch"] != best_row(rows)["epoch"]:
        raise UserError(f"{best}: not the best epoch of last.pt; delete {fold.folder} to train the fold again")
    fold.write_log(rows)


def resume(learner: Learner, last: Path) -> list[Row]:
    """Load a checkpoint into `learner`; return the log, a row per finished epoch.

    Raises:
        UserError: `last` is missing, damaged or of another net.
    """
    state = checkpoint.load(last, "net", "average", "optimizer", "scaler", "log")
    with reading(last, checkpoint.ANEW):
        load_trained(learner.net, state["net"])
        load_trained(learner.average, state["average"])
        load_optimizer(learner.optimizer, state["optimizer"])
        if state["scaler"] and learner.scaler.is_enabled():
            learner.scaler.load_state_dict(state["scaler"])
    return checkpoint.read_log(last, state)


def load_best(fold: Fold, config: Config, backend: Backend) -> nn.Module:
    """Return the net of `fold` with its best weights, in evaluation mode on the backend.

    Raises:
        UserError: The checkpoint is missing, damaged or of another net; or the pretrained weights of its frozen layers, which
            it lacks, are missing or not those that it was trained with.
    """
    content = checkpoint.load(fold.best_checkpoint, "net")
    is_frozen = config.freeze > 0
    if is_frozen:
        Run(fold.run_folder).check_weights(config.weights, weights_sha256(config))
    net = create(config, weights=is_frozen)
    with reading(fold.best_checkpoint, checkpoint.ANEW):
        load_trained(net, content["net"])
    return backend.place(net).eval()


def load_trained(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load `state`, the tensors of `net` that are not frozen.

    Raises:
        KeyError: `state` has other tensors.
        RuntimeError: A tensor has another shape.
    """
    if different := trained_state(net).keys() ^ state.keys():
        raise KeyError(sorted(different)[0])
    net.load_state_dict(state, strict=False)


def _state(learner: Learner, rows: list[Row]) -> dict[str, Any]:
    return {
        "net": trained_state(learner.net),
        "average": trained_state(learner.average),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "log": json.dumps(rows),
    }
