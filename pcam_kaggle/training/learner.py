"""A model in training: one step, from tensors that stay in place, and its state on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import reading
from pcam_kaggle.models.backbone import copy_trained, trained_state
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import weights_sha256
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend, memory_errors
from pcam_kaggle.training.distributed import average_gradients
from pcam_kaggle.training.optim import create_optimizer, load_optimizer
from pcam_kaggle.training.schedule import MovingAverage

# Largest gradient norm.
CLIP_NORM = 1.0


class EpochRow(TypedDict):
    """A row of log.csv; `epoch` is from 1, `lr` that at its end, `seconds` include `valid_seconds`; see `FoldMetrics`.

    `valid_auc` and `valid_loss` are those of the EMA; rows of earlier versions lack `valid_loss`.
    """

    epoch: int
    lr: float
    train_loss: float
    valid_auc: float
    valid_loss: NotRequired[float]
    seconds: float
    valid_seconds: float
    images_per_second: float
    loader_wait: float


class Learner:
    """A model on the device, its EMA and its optimizer, and the step that changes them.

    A step reads `patches` (uint8, (count, side, side, 3)), `targets` (float32, (count,)), the learning rate and the weight of
    the EMA from tensors that stay in place, so that a CUDA graph, `replay`, may repeat it. Frozen layers are shared. A `teach`
    returns the targets of the images of a step, as `load_teacher` says, in place of those that were loaded.
    """

    def __init__(
        self, model: nn.Module, config: Config, backend: Backend, count: int, teach: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.model, self.ema, self.backend, self.teach = model, copy_trained(model), backend, teach
        self.optimizer = create_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(backend.kind, enabled=backend.precision == "fp16")
        self.patches = torch.zeros(count, config.side, config.side, 3, dtype=torch.uint8, device=backend.kind)
        self.targets, self.loss, self._weight = (torch.zeros(shape, device=backend.kind) for shape in ((count,), (), ()))
        self._average = MovingAverage(self.ema, model)
        self.replay: Callable[[], object] | None = None
        self.steps, self.waited = "", 0.0  # for FoldMetrics; seconds of an epoch

    def load(self, patches: Tensor, targets: Tensor, lr: float, weight: float) -> None:
        """Set what the next step reads: a batch, the learning rate, and the weight of the newest weights in the EMA, (0, 1]."""
        for to, read in ((self.patches, patches), (self.targets, targets)):
            # Memory that is not pinned may be overwritten before an asynchronous copy reads it.
            to.copy_(read, non_blocking=read.is_cuda or read.is_pinned())
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr * group["lr_scale"])
        self._weight.fill_(weight)

    def step(self) -> None:
        """Take a step, as a CUDA graph if there is one."""
        (self.replay or self.compute)()

    def compute(self) -> None:
        """Take a step eagerly."""
        images = self.backend.images(self.patches)
        targets = self.teach(images) if self.teach else self.targets
        with self.backend.autocast():
            logits = self.model(images)
        loss = binary_cross_entropy_with_logits(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average.update(self._weight)
        self.loss.copy_(loss.detach())

    def tensors(self) -> Iterator[Tensor]:
        """Return all tensors that a step changes, but those of the scaler."""
        for net in (self.model, self.ema):
            yield from net.parameters()
            yield from net.buffers()
        for state in self.optimizer.state.values():
            yield from state.values()

    def save(self, fold: Fold, rows: list[EpochRow]) -> None:
        """Write the state after the last epoch of `rows` to the fold's folder."""
        state = {
            "net": trained_state(self.model),
            "average": trained_state(self.ema),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "log": json.dumps(rows),
        }
        checkpoint.save(fold.last_checkpoint, state)
        self.save_best(fold, rows)

    def save_best(self, fold: Fold, rows: list[EpochRow]) -> None:
        """Write best checkpoint and log, also those that an interruption after the last checkpoint left out."""
        best = best_row(rows)
        if best is rows[-1]:
            state = {"net": trained_state(self.ema), "epoch": len(rows), "valid_auc": best["valid_auc"]}
            checkpoint.save(fold.best_checkpoint, state)
        elif checkpoint.load(fold.best_checkpoint, "epoch")["epoch"] != best["epoch"]:
            raise UserError(f"{fold.best_checkpoint}: not the best epoch of last.pt; {checkpoint.ANEW}")
        fold.write_log(rows)

    def resume(self, last: Path) -> list[EpochRow]:
        """Load the checkpoint `last`; return the log. Raises UserError if it is damaged or of another model."""
        state = checkpoint.load(last, "net", "average", "optimizer", "scaler", "log")
        with reading(last, checkpoint.ANEW):
            _load(self.model, state["net"])
            _load(self.ema, state["average"])
            load_optimizer(self.optimizer, state["optimizer"])
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
        return cast("list[EpochRow]", checkpoint.read_log(last, state))


def best_row(rows: list[EpochRow]) -> EpochRow:
    """Return the row of the epoch with the highest validation AUC, the first of equals."""
    return max(rows, key=lambda row: row["valid_auc"])


def load_best(fold: Fold, config: Config, backend: Backend) -> nn.Module:
    """Return the model of `fold` with its best weights in evaluation mode; raises UserError if they are missing or others."""
    content = checkpoint.load(fold.best_checkpoint, "net")
    # Checkpoints lack frozen layers.
    if is_frozen := config.freeze > 0:
        Run(fold.run_folder).check_weights(config.weights, weights_sha256(config))
    net = create(config, weights=is_frozen)
    with reading(fold.best_checkpoint, checkpoint.ANEW):
        _load(net, content["net"])
    with memory_errors(f"model={config.model}"):
        return backend.place(net).eval()


def _load(net: nn.Module, state: dict[str, Tensor]) -> None:
    if different := trained_state(net).keys() ^ state.keys():
        raise KeyError(sorted(different)[0])
    net.load_state_dict(state, strict=False)
