"""Reads one patch from its TIF file and checks it."""

import hashlib
import os
import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pcam_kaggle.core.config import PATCH_SIDE

SHAPE = (PATCH_SIDE, PATCH_SIDE, 3)
PATCH_BYTES = PATCH_SIDE * PATCH_SIDE * 3

COMPRESSION_TAG = 259
UNCOMPRESSED = 1
# Values of the compression tag that the libtiff of OpenCV's wheels decodes. OpenCV returns a black image for some of the others
# without an error.
READABLE = {UNCOMPRESSED, 5, 7, 8, 32773, 32946}
COMPRESSIONS = {
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    **dict.fromkeys((50002, 52546), "JPEG XL"),
    34887: "LERC",
    34925: "LZMA",
    34933: "PNG",
    34934: "JPEG XR",
    50000: "zstd",
    50001: "WebP",
}
# Directory layout of TIFF (version 42) and BigTIFF (version 43): position and struct format of the offset of the first
# directory, format of its number of entries, size of an entry in bytes, position of the value in an entry (TIFF 6.0, section 2;
# libtiff's page on BigTIFF).
DIRECTORIES = {42: (4, "I", "H", 12, 8), 43: (8, "Q", "Q", 20, 12)}


class Damaged(Exception):
    """A patch that cannot be used.

    Attributes:
        reason: What is wrong with the file.
        advice: What the user can do about it.
    """

    def __init__(self, reason: str, advice: str = "copy the file again") -> None:
        super().__init__(reason, advice)
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}"


def read_patch(path: Path) -> tuple[NDArray[np.uint8], bytes]:
    """Return the patch in the TIF at `path`, RGB uint8 (96, 96, 3), and the SHA-1 of its pixels; see `read_patch_into`."""
    patch = np.empty(SHAPE, np.uint8)
    return patch, read_patch_into(path, patch)


def read_patch_into(path: Path, target: NDArray[np.uint8]) -> bytes:
    """Read the patch in the TIF at `path` into `target`; return the SHA-1 of its pixels in C order, 20 bytes.

    The competition's files end with their uncompressed pixels, and each file is named by the SHA-1 of its pixels. If the SHA-1
    of the last bytes equals the file's name, these bytes are the patch and no decoder is needed. All other files are decoded.

    Args:
        path: The file.
        target: RGB uint8 (96, 96, 3), contiguous. It holds anything after an error.

    Raises:
        Damaged: The file cannot be read or is not an 8-bit RGB TIF of 96x96 px.
    """
    pixels = target.data.cast("B")
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            head = bytearray(max(0, os.fstat(descriptor).st_size - PATCH_BYTES))
            count = os.readv(descriptor, [head, pixels])
        finally:
            os.close(descriptor)
        digest = hashlib.sha1(pixels, usedforsecurity=False)
        if count == len(head) + PATCH_BYTES and digest.hexdigest() == path.stem:
            return digest.digest()
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damaged("a link whose target is missing" if path.is_symlink() else "missing") from None
    except OSError as error:
        raise Damaged(f"can't be read ({error.strerror})") from None
    target[:] = _decode(content)
    return hashlib.sha1(pixels, usedforsecurity=False).digest()


def _decode(content: bytes) -> NDArray[np.uint8]:
    """Return the patch of a TIF with the bytes `content`; raise Damaged for any other content."""
    compression = _compression(content)
    if compression not in READABLE:
        name = COMPRESSIONS.get(compression, f"method {compression}")
        raise Damaged(f"compressed with {name}, which OpenCV can't read", "re-save uncompressed")
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise Damaged("does not decode, is cut short or damaged")
    if image.dtype != np.uint8:
        raise Damaged(f"is {image.dtype}, not 8 bit", "save as 8-bit RGB")
    if image.shape != SHAPE:
        raise Damaged(f"is {'x'.join(map(str, image.shape))}, not {'x'.join(map(str, SHAPE))}", "take the original patch")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _compression(content: bytes) -> int:
    """Return the compression tag in the first directory of a TIFF; UNCOMPRESSED if `content` has no such tag."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        return UNCOMPRESSED
    try:
        (version,) = struct.unpack_from(f"{order}H", content, 2)
        place, offset, number, size, value = DIRECTORIES[version]
        (start,) = struct.unpack_from(order + offset, content, place)
        (count,) = struct.unpack_from(order + number, content, start)
        first = start + struct.calcsize(order + number)
        for entry in range(first, first + count * size, size):
            if struct.unpack_from(f"{order}H", content, entry) == (COMPRESSION_TAG,):
                return struct.unpack_from(f"{order}H", content, entry + value)[0]
    except (struct.error, KeyError, IndexError, OverflowError):
        pass
    return UNCOMPRESSED
