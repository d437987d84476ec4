"""Creates the optimizer of a config, with parameter groups."""

from typing import Any

import torch
from torch import nn

from pcam_kaggle.config.schema import Config
from pcam_kaggle.models.factory import Backbone
from pcam_kaggle.models.pretrained import import_timm

# Decoupled, of convolution and linear weights.
WEIGHT_DECAY = 0.05
# Layers whose factor of the learning rate is below this are frozen.
MIN_LR_SCALE = 0.1


def create_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names; each of its parameter groups has an `lr_scale`."""
    groups = parameter_groups(net, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    import_timm()
    from timm.optim import Muon

    return Muon(groups, lr=config.lr, nesterov=True)


def parameter_groups(net: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Split the parameters of `net` into groups for an optimizer; biases and other vectors get no weight decay.

    In a timm net the learning rate falls by `config.layer_decay` from each layer to the one below it, and layers below a tenth
    of the rate are frozen.

    Returns:
        Groups with `params`, `weight_decay`, and `lr_scale`, the factor of the learning rate.
    """
    if isinstance(net, Backbone):
        import_timm()
        from timm.optim import param_groups_layer_decay

        return param_groups_layer_decay(net.net, WEIGHT_DECAY, layer_decay=config.layer_decay, no_opt_scale=MIN_LR_SCALE)
    parameters = list(net.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY, "lr_scale": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
