"""Creates the optimizer of a config, with parameter groups."""

from typing import Any

import torch
from torch import nn

from pcam_kaggle.config.schema import Config
from pcam_kaggle.models.backbone import Backbone
from pcam_kaggle.models.weights import import_timm

# Decoupled, of convolution and linear weights.
WEIGHT_DECAY = 0.05


def create_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names; each of its parameter groups has an `lr_scale`."""
    groups = parameter_groups(net, config.layer_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    import_timm()
    from timm.optim import Muon

    return Muon(groups, lr=config.lr, nesterov=True)


def parameter_groups(net: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the parameters of `net` that are trained into groups for an optimizer; biases and other vectors do not decay.

    Args:
        net: The net.
        layer_decay: Learning rate of a layer relative to that of the layer above it, for a net of timm.

    Returns:
        Groups with `params`, `weight_decay`, and `lr_scale`, the factor of the learning rate.
    """
    if isinstance(net, Backbone):
        timm_net: Any = net.net
        import_timm()
        from timm.optim import param_groups_layer_decay

        # Positions and class tokens of transformers do not decay either.
        exempt = timm_net.no_weight_decay() if hasattr(timm_net, "no_weight_decay") else ()
        return param_groups_layer_decay(timm_net, WEIGHT_DECAY, exempt, layer_decay=layer_decay)
    parameters = list(net.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY, "lr_scale": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
