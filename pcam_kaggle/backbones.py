"""The net that a config asks for: our own, or one of timm's."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.model import BottleneckCNN, Normalize


class Backbone(nn.Module):
    """A timm classifier with its own normalisation: RGB (n, 3, side, side) in [0, 1] to logits (n,)."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalize(x)).squeeze(1)


def create(config: Config, weights: bool = True) -> nn.Module:
    """Return the net of `config`, freshly initialised; with `weights` false no pretrained weights are looked for.

    Raises UserError on a timm name or a weights file that does not exist, and where the patch is too small for the blocks.
    """
    if config.model == "cnn":
        return BottleneckCNN(
            config.n_blocks,
            config.width,
            side=config.side,
            body=config.body,
            depth=config.depth,
            max_width=config.max_width,
            pool_first=config.pool_first,
            head=config.head,
            hidden=config.hidden,
            dropout=config.dropout,
        )
    timm = _timm()
    name = config.model.removeprefix("timm:")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5])
        raise UserError(f"model={config.model}: timm has no such net" + (f"; it has {near}" if near else ""))
    source: dict[str, Any] = {"pretrained": weights and bool(config.weights)}
    if source["pretrained"] and config.weights != "pretrained":
        if not Path(config.weights).is_file():
            raise UserError(f"weights={config.weights}: no such file")
        source["pretrained_cfg_overlay"] = {"file": config.weights}
    try:
        net = timm.create_model(name, num_classes=1, drop_rate=config.dropout, **source)
        backbone = Backbone(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, config.side, config.side))
    except Exception as error:
        # What timm and its loaders raise on a patch or a file that they can't take is their own affair, and has no common type.
        said = " ".join(str(error).split())[:200]
        raise UserError(f"model={config.model}, weights={config.weights or 'none'}: {type(error).__name__}, {said}") from None
    return backbone.train()


@cache
def _timm() -> Any:
    """Import timm, beside a torchvision whose compiled operators do not load as well.

    torchvision's wheel is built for CUDA; with a CPU build of torch its `nms` is missing and importing timm fails
    (pytorch/vision#9085). Naming the operators' schemas is enough, since no net calls them.
    """
    try:
        import timm
    except RuntimeError:
        for partial in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[partial]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm

        timm.torchvision_operators = library  # The schemas live as long as this object does.
    return timm
