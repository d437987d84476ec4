"""Learning rate, and exponential moving average (EMA) of the weights, over the course of a training."""

import math

import torch
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.models.backbone import trained_state

# The weight of the newest weights after t steps is at least EMA_START / (EMA_START + t), to forget the initial ones.
EMA_START = 9
# The rise takes so many epochs, at most half of them; the learning rate at the end is relative to the peak.
WARMUP_EPOCHS, FINAL_LR = 1.0, 0.01


def learning_rate(config: Config, progress: float) -> float:
    """Return the learning rate after `progress` epochs: a linear rise, then half a cosine (Loshchilov & Hutter 2017)."""
    warmup = min(WARMUP_EPOCHS, config.epochs / 2)
    if progress < warmup:
        return config.lr * progress / warmup
    part = min(1.0, (progress - warmup) / (config.epochs - warmup))
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * part)) / 2)


def ema_weight(config: Config, steps: int, taken: int) -> float:
    """Return the weight of the newest weights in the EMA, in (0, 1], after `taken` steps, `steps` of them per epoch."""
    return max(1 / max(1.0, config.average_epochs * steps), EMA_START / (EMA_START + taken))


class MovingAverage:
    """Moves the trained tensors of `ema` towards those of `net`, of the same architecture; both must keep their tensors."""

    def __init__(self, ema: nn.Module, net: nn.Module) -> None:
        states = [list(trained_state(each).values()) for each in (ema, net)]
        self._ema, self._net = ([tensor for tensor in state if tensor.is_floating_point()] for state in states)
        integers = ([tensor for tensor in state if not tensor.is_floating_point()] for state in states)
        self._copied = list(zip(*integers, strict=True))

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Move the EMA by `weight`, in (0, 1] and on the device of the models; integers are copied."""
        # Exact at a weight of one, and three kernels on a GPU, where lerp takes no weight that is a tensor for all at once.
        torch._foreach_sub_(self._ema, self._net)
        torch._foreach_mul_(self._ema, 1 - weight)
        torch._foreach_add_(self._ema, self._net)
        for to, new in self._copied:
            to.copy_(new)
