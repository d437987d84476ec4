"""Creates the optimizer of a config, with parameter groups."""

from typing import Any

import torch
from torch import nn

from pcam_kaggle.config.schema import Config
from pcam_kaggle.models.pretrained import import_timm

# Decoupled, of convolution and linear weights.
WEIGHT_DECAY = 0.05


def create_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names."""
    groups = parameter_groups(net)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    import_timm()
    from timm.optim import Muon

    return Muon(groups, lr=config.lr, nesterov=True)


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Split the parameters of `net` into groups for an optimizer; biases and other vectors get no weight decay.

    Returns:
        Groups with `params` and `weight_decay`.
    """
    parameters = list(net.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
