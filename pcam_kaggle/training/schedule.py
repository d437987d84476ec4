"""Learning rate and moving average of the weights over the course of a training."""

import math

import torch
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.models.backbone import trained_state

# The average's weight after t steps is at least AVERAGE_START / (AVERAGE_START + t).
AVERAGE_START = 9

WARMUP_EPOCHS = 1.0
# Relative to the peak.
FINAL_LR = 0.01


def learning_rate(config: Config, progress: float) -> float:
    """Return the learning rate after a number of epochs, fractions included.

    It rises linearly from 0 over the first epoch, then falls as half a cosine to 1 % (Loshchilov & Hutter 2017).
    """
    if progress < WARMUP_EPOCHS:
        return config.lr * progress / WARMUP_EPOCHS
    part = min(1.0, (progress - WARMUP_EPOCHS) / max(1e-9, config.epochs - WARMUP_EPOCHS))
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * part)) / 2)


def average_weight(config: Config, steps: int, taken: int) -> float:
    """Return the weight of the newest weights in their moving average, in (0, 1].

    It is one over the horizon in steps, and larger at the start, where the average would otherwise stay near the initial
    weights.

    Args:
        config: Source of `average_epochs`, the horizon in epochs.
        steps: Steps per epoch.
        taken: Steps taken before this one.
    """
    return max(1 / max(1.0, config.average_epochs * steps), AVERAGE_START / (AVERAGE_START + taken))


class MovingAverage:
    """Moves the trained tensors of one net towards those of another.

    Args:
        average: The net that changes.
        net: The net that it follows, of the same architecture; both must keep their tensors.
    """

    def __init__(self, average: nn.Module, net: nn.Module) -> None:
        pairs = list(zip(trained_state(average).values(), trained_state(net).values(), strict=True))
        self._moved, self._copied = (
            ([to for to, _ in chosen], [new for _, new in chosen])
            for chosen in (
                [pair for pair in pairs if pair[0].is_floating_point()],
                [pair for pair in pairs if not pair[0].is_floating_point()],
            )
        )

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Move the average by `weight`, in (0, 1] and on the device of the nets; integers are copied."""
        average, net = self._moved
        # Exact at a weight of one, and three kernels on a GPU, where lerp takes no weight that is a tensor for all at once.
        torch._foreach_sub_(average, net)
        torch._foreach_mul_(average, 1 - weight)
        torch._foreach_add_(average, net)
        for to, new in zip(*self._copied, strict=True):
            to.copy_(new)
