"""Creates the net of a config: the project's own, or one of timm's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcam_kaggle import UserError
from pcam_kaggle.config.schema import Config
from pcam_kaggle.models.cnn import BottleneckCNN, Normalize
from pcam_kaggle.models.pretrained import create_timm, import_timm


class Backbone(nn.Module):
    """A timm classifier that enlarges and normalises its input as its pretrained weights expect.

    Shape: RGB (n, 3, side, side) in [0, 1] to logits (n,).

    Args:
        net: The classifier, with one output.
        mean: Mean of each channel that it expects.
        std: Standard deviation of each channel that it expects.
        resize: Side in pixels that the input is enlarged to; 0 for no change.
    """

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], resize: int) -> None:
        super().__init__()
        self.resize = resize
        self.normalize = Normalize(mean, std)
        self.net = net
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.forward = partial(_full_precision, module.forward)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images `x`."""
        return self.net(self.normalize(enlarge(x, self.resize))).squeeze(1)


def enlarge(x: Tensor, side: int) -> Tensor:
    """Return images resized to `side` px by antialiased bicubic interpolation, in their own dtype and range.

    Args:
        x: (n, 3, h, w) in [0, 1]; float32, since fp16 and bf16 would round colours.
        side: Side in pixels; 0 for no change.
    """
    if not side:
        return x
    # Autocast leaves this operator in the dtype of its input. Bicubic interpolation overshoots at edges.
    return nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def _full_precision(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run `forward` in fp32 on a CPU, where the bf16 gradient of a depthwise convolution is up to ten times slower."""
    if x.device.type != "cpu":
        return forward(x)
    with torch.autocast("cpu", enabled=False):
        return forward(x.float()).to(x.dtype)


def create(config: Config, weights: bool = True) -> nn.Module:
    """Return the net of `config` in training mode.

    Args:
        config: The experiment's config.
        weights: Load the pretrained weights that `config` names; otherwise all weights are random.

    Raises:
        UserError: Timm has no net of this name, weights are missing or do not fit (see `create_timm`), or the patch is too
            small for the net.
    """
    if config.model == "cnn":
        return BottleneckCNN(
            config.n_blocks,
            config.width,
            side=config.side,
            body=config.body,
            symmetry=config.symmetry,
            max_width=config.max_width,
            head=config.head,
            hidden=config.hidden,
            dropout=config.dropout,
        )
    timm = import_timm()
    name = config.model.removeprefix("timm:")
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5])
        raise UserError(f"model={config.model}: timm has no such net" + (f"; it has {similar}" if similar else ""))
    try:
        net: Any = create_timm(name, config.weights if weights else "", drop_rate=config.dropout)
        backbone = Backbone(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"], config.resize)
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, config.side, config.side))
    except UserError:
        raise
    except Exception as error:
        # The errors of timm and its loaders have no common type.
        message = " ".join(str(error).split())[:200]
        advice = "; without internet weights must be a file's path" if config.weights == "pretrained" else ""
        fields = f"model={config.model}, weights={config.weights or 'none'}"
        raise UserError(f"{fields}: {type(error).__name__}, {message}{advice}") from None
    return backbone.train()


def macs(net: nn.Module, side: int) -> int:
    """Return the multiply-accumulate operations of a forward pass of `net` on one patch of `side` px."""
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2
