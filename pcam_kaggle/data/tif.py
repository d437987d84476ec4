"""Reads one patch from its TIF file and checks it."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pcam_kaggle.core.config import PATCH_SIDE

SHAPE = (PATCH_SIDE, PATCH_SIDE, 3)
PATCH_BYTES = PATCH_SIDE * PATCH_SIDE * 3
# A file that was re-encoded often kept its name. Pillow would open others with an external program.
FORMATS = ("TIFF", "JPEG", "PNG")


@dataclass(eq=False)
class Damaged(Exception):
    """A patch that cannot be used: the reason, and what the user can do about it."""

    reason: str
    advice: str = "copy the file again"


def read_patch(path: Path, target: NDArray[np.uint8]) -> str:
    """Read the patch in the TIF at `path` into `target`, RGB uint8 (96, 96, 3), contiguous; return the SHA-1 of its pixels.

    The competition's files end with their uncompressed pixels, and each file is named by the SHA-1 of its pixels. If the SHA-1
    of the last bytes equals the file's name, these bytes are the patch and no decoder is needed. All other files are decoded.

    Raises:
        Damaged: The file cannot be read or is not an 8-bit RGB image of 96x96 px.
    """
    pixels = target.data.cast("B")
    try:
        with path.open("rb", buffering=0) as file:
            head = bytearray(max(0, os.fstat(file.fileno()).st_size - PATCH_BYTES))
            count = os.readv(file.fileno(), [head, pixels])
        digest = hashlib.sha1(pixels, usedforsecurity=False).hexdigest()
        if count == len(head) + PATCH_BYTES and digest == path.stem:
            return digest
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damaged("a link whose target is missing" if path.is_symlink() else "missing") from None
    except OSError as error:
        raise Damaged(f"can't be read ({error.strerror})") from None
    target[:] = _decode(content)
    return hashlib.sha1(pixels, usedforsecurity=False).hexdigest()


def _decode(content: bytes) -> NDArray[np.uint8]:
    try:
        with _silent(), Image.open(BytesIO(content), formats=FORMATS) as image:
            # Pillow drops the lower 8 of 16 bits.
            depth = "16-bit " if ";16" in str(image.tile) else ""
            found = f"{image.width}x{image.height} px {depth}{image.mode}"
            if found == f"{PATCH_SIDE}x{PATCH_SIDE} px RGB":
                return np.asarray(image)
    # A damaged header may raise anything, from SyntaxError to DecompressionBombError.
    except Exception:
        raise Damaged("can't be decoded: cut short, damaged or compressed in an unsupported way") from None
    raise Damaged(f"is {found}, not {PATCH_SIDE}x{PATCH_SIDE} px RGB", "take the original patch, or save it as 8-bit RGB")


@contextmanager
def _silent() -> Iterator[None]:
    # libtiff prints about damaged files, and Pillow warns; the error that follows is reported once.
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
