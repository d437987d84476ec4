"""A net on the disk: its weights and what is needed to go on or to use them."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from pcam_kaggle.artifacts import write
from pcam_kaggle.errors import UserError


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers and texts to `path`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def load(path: Path, *keys: str) -> dict[str, Any]:
    """Return what `save` wrote to `path`, on the CPU; no code in the file is run.

    Raises UserError where it is missing, damaged, or lacks one of `keys`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; run `python -m pcam_kaggle train` first") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        raise UserError(f"{path}: not a whole checkpoint; delete its folder and train again") from None
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; delete its folder and train again")
    return content
