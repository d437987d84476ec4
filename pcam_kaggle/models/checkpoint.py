"""A net on the disk: its weights and what is needed to go on or to use them."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from pcam_kaggle import UserError
from pcam_kaggle.data.atomic_io import reading, write

ANEW = "delete its folder and train again"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers and texts to `path`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def load(path: Path, *keys: str) -> dict[str, Any]:
    """Return what `save` wrote to `path`, on the CPU; no code in the file is run, and nothing in it is inflated.

    Raises UserError where it is missing, where a byte of it has changed, and where it lacks one of `keys`.
    """
    try:
        with zipfile.ZipFile(path) as members:
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist())
            # torch reads past the checksums that it wrote.
            whole = not packed and members.testzip() is None
        content = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; run `python -m pcam_kaggle train` first") from None
    except Exception:
        # What zipfile and torch raise on a file that is none of theirs has no common type.
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a whole checkpoint; {ANEW}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {ANEW}")
    return content


def read_log(path: Path, content: dict[str, Any]) -> list[dict[str, float]]:
    """Return the log, a row per finished epoch, in `content` that was loaded from `path`; raises UserError where it is none."""
    with reading(path, ANEW):
        rows = [{key: float(value) for key, value in row.items()} for row in json.loads(content["log"])]
        return [row | {"epoch": int(row["epoch"]), "valid_auc": row["valid_auc"]} for row in rows]
