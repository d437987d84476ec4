"""Checkpoints on the disk: weights, and the state that is needed to resume training."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.files import reading, write

ANEW = "delete its folder and train again"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers and strings to `path` atomically."""
    # torch takes a second to import, which commands that read no checkpoint need not wait for.
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def load(path: Path, *keys: str) -> dict[str, Any]:
    """Return the content of `path`, on the CPU and without running code; UserError if it is damaged or lacks one of `keys`."""
    import torch

    try:
        with zipfile.ZipFile(path) as members:
            # torch does not verify the checksums that it wrote.
            damaged = members.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
        is_complete = not damaged and content.keys() >= {*keys}
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; run `{program()} train` first") from None
    except Exception:
        # The errors of zipfile and torch on other files have no common type.
        is_complete = False
    if not is_complete:
        raise UserError(f"{path}: not a complete checkpoint; {ANEW}")
    return content


def read_log(path: Path, content: dict[str, Any]) -> list[dict[str, float]]:
    """Return the training log in the `content` of the checkpoint at `path`, a row per finished epoch; or raise UserError."""
    with reading(path, ANEW):
        rows = [{key: float(value) for key, value in row.items()} for row in json.loads(content["log"])]
        return [row | {"epoch": int(row["epoch"]), "valid_auc": row["valid_auc"]} for row in rows]
