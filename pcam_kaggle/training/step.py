"""One step of training: forward and backward pass, clipping, optimizer and moving average, from tensors that stay in place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer

from pcam_kaggle.core.config import Config
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.distributed import average_gradients
from pcam_kaggle.training.schedule import MovingAverage

# Largest gradient norm.
CLIP_NORM = 1.0


@dataclass(slots=True)
class Learner:
    """The state that training changes, and the backend it runs on.

    Attributes:
        net: The net whose parameters the optimizer updates.
        average: The moving average of its weights, which is validated and predicts; it shares frozen layers with `net`.
        optimizer: Each of its parameter groups has `lr`, a tensor, and `lr_scale`, a factor of the learning rate.
        scaler: Gradient scaler, active in fp16 only.
        backend: Device, precision and memory format.
    """

    net: nn.Module
    average: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    backend: Backend

    def tensors(self) -> Iterator[Tensor]:
        """Return all tensors that a step changes, but those of the scaler."""
        for net in (self.net, self.average):
            yield from net.parameters()
            yield from net.buffers()
        for state in self.optimizer.state.values():
            yield from state.values()


class TrainStep:
    """A step of training that reads a batch, the learning rate and the weight of the average from its own tensors.

    Nothing is read back from the device, so `compute` may be captured as a CUDA graph, which repeats what it did with the
    same tensors.

    Args:
        learner: What a step changes.
        config: Source of `side`.
        count: Patches of a batch.

    Attributes:
        loss: The mean loss of the last batch, a tensor without axes.
        replay: What repeats `compute` as a CUDA graph, if anything.
    """

    def __init__(self, learner: Learner, config: Config, count: int) -> None:
        self.learner = learner
        kind = learner.backend.kind
        self.patches = torch.zeros(count, config.side, config.side, 3, dtype=torch.uint8, device=kind)
        self.targets, self.loss, self.weight = (torch.zeros(shape, device=kind) for shape in ((count,), (), ()))
        self._average = MovingAverage(learner.average, learner.net)
        self.replay: Callable[[], object] | None = None

    def load(self, patches: Tensor, targets: Tensor, lr: float, weight: float) -> None:
        """Set what the next step reads.

        Args:
            patches: uint8 (count, side, side, 3).
            targets: float32 (count,).
            lr: Learning rate before the factors of the parameter groups.
            weight: Weight of the newest weights in their moving average, in (0, 1].
        """
        for to, read in ((self.patches, patches), (self.targets, targets)):
            # The loader may overwrite memory that is not pinned before an asynchronous copy reads it.
            to.copy_(read, non_blocking=read.is_cuda or read.is_pinned())
        for group in self.learner.optimizer.param_groups:
            group["lr"].fill_(lr * group["lr_scale"])
        self.weight.fill_(weight)

    def run(self) -> None:
        """Take the step."""
        if self.replay:
            self.replay()
        else:
            self.compute()

    def compute(self) -> None:
        """Take the step eagerly."""
        learner = self.learner
        with learner.backend.autocast():
            logits = learner.net(learner.backend.images(self.patches))
        loss = binary_cross_entropy_with_logits(logits.float(), self.targets)
        learner.optimizer.zero_grad(set_to_none=True)
        learner.scaler.scale(loss).backward()
        average_gradients(learner.net)
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.net.parameters(), CLIP_NORM)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        self._average.update(self.weight)
        self.loss.copy_(loss.detach())
