"""Creates the model of a config: the project's own, or one of timm's."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.backbone import Backbone
from pcam_kaggle.models.cnn import BottleneckCNN
from pcam_kaggle.models.timm_model import create_timm


def create(config: Config, weights: bool = True) -> nn.Module:
    """Return the model of `config` in training mode, with the pretrained weights that it names or, without `weights`, random.

    Raises UserError as `create_timm`, or if the model does not take patches of this size.
    """
    if config.model == "cnn":
        return BottleneckCNN(config.n_blocks, config.width, config)
    try:
        return _backbone(config, weights)
    except UserError:
        raise
    except Exception as error:
        # The errors of timm and its loaders have no common type.
        given = {key: getattr(config, key) for key in ("model", "weights", "model_args", "resize", "pool")}
        fields = ", ".join(f"{key}={value}" for key, value in given.items() if value not in ("", 0, "default"))
        advice = "; without internet weights must be a file's path" if config.weights == "pretrained" else ""
        raise UserError(f"{fields}: {type(error).__name__}, {' '.join(str(error).split())[:200]}{advice}") from None


def _backbone(config: Config, weights: bool) -> Backbone:
    net: Any = create_timm(config, weights)
    expected = net.pretrained_cfg
    needed = config.resize or (expected["input_size"][-1] if expected.get("fixed_input_size") else 0)
    if config.grad_checkpointing:
        net.set_grad_checkpointing(True)
    backbone = Backbone(net, expected["mean"], expected["std"], 0 if needed == config.side else needed)
    if config.freeze:
        backbone.freeze(config.freeze)
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, config.side, config.side))
    return backbone.train()


def macs(net: nn.Module, side: int) -> int:
    """Return the multiply-accumulate operations of a forward pass of `net` on one patch of `side` px."""
    net.eval()
    # The counter knows no formula for the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2
