"""Learning rate and moving average of the weights over the course of a training."""

import math

import torch
from torch import nn

from pcam_kaggle.config.schema import Config
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


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, weight: float) -> None:
    """Move the trained tensors of `average` towards those of `net` by `weight`, in (0, 1]; integers are copied."""
    pairs = list(zip(trained_state(average).values(), trained_state(net).values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([to for to, _ in floats], [new for _, new in floats], weight)
    for to, new in pairs:
        if not to.is_floating_point():
            to.copy_(new)
