"""A TIF's pixels are read exactly, however the file keeps them, and an unusable file is named."""

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import first_tif, sha1
from numpy.typing import NDArray
from PIL import Image

from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.tif import Damaged, read_patch

SIZE = 96 * 96 * 3
RGB = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8), (0, 0), 1)
IMAGE = Image.fromarray(RGB)
WIDTH, HEIGHT, COMPRESSION = 256, 257, 259


def encoded(image: Image.Image = IMAGE, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, **{"format": "TIFF", **options})
    return file.getvalue()


def tagged(value: int, *tags: int) -> bytes:
    """Return an uncompressed TIFF of the patch whose `tags` have another value."""
    content = bytearray(encoded(compression="raw"))
    for tag in tags:
        place = max(content.find(struct.pack("<HHI", tag, kind, 1)) for kind in (3, 4))
        struct.pack_into("<I", content, place + 8, value)
    return bytes(content)


def read(content: bytes | bytearray, folder: Path) -> NDArray[np.uint8]:
    tif, patch = folder / "patch.tif", np.empty((96, 96, 3), np.uint8)
    tif.write_bytes(content)
    assert read_patch(tif, patch) == sha1(patch)
    return patch


EXACT = {
    **{kind: encoded(compression=kind) for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")},
    "BigTIFF": encoded(big_tiff=True, compression="tiff_lzw"),
    "two pages": encoded(save_all=True, append_images=[Image.new("RGB", (96, 96))]),
    "PNG": encoded(format="PNG"),
}


@pytest.mark.parametrize("content", EXACT.values(), ids=EXACT)
def test_pixels_are_read_exactly(content: bytes, tmp_path: Path) -> None:
    assert np.array_equal(read(content, tmp_path), RGB)


CHANGED = {
    "JPEG in TIFF": encoded(compression="jpeg", quality=60),
    "JPEG": encoded(format="JPEG"),
    **{f"orientation {number}": encoded(tiffinfo={274: number}, compression="tiff_lzw") for number in range(2, 9)},
}


@pytest.mark.parametrize("content", CHANGED.values(), ids=CHANGED)
def test_lossy_and_rotated_files_are_read_as_by_opencv(content: bytes, tmp_path: Path) -> None:
    expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(read(content, tmp_path), expected[..., ::-1])
    assert not np.array_equal(expected[..., ::-1], RGB)


DEEP = RGB.astype(np.uint16) * 257
REFUSED = [
    *[(cv2.imencode(kind, DEEP)[1].tobytes(), "is 96x96 px 16-bit RGB, not 96x96 px RGB.*8-bit") for kind in (".tif", ".png")],
    *[(encoded(IMAGE.convert(mode)), f"is 96x96 px {mode}, not 96x96 px RGB") for mode in ("1", "L", "P", "RGBA", "CMYK", "F")],
    (encoded(IMAGE.resize((95, 96))), "is 95x96 px RGB, not 96x96 px RGB.*take the original"),
    (tagged(12000, WIDTH, HEIGHT), "is 12000x12000 px RGB"),
    *[(content, "can't be decoded") for content in (b"", b"II*", b"no image" * 99, encoded(format="GIF"))],
    *[(EXACT[kind][: SIZE // 2], "can't be decoded") for kind in ("raw", "tiff_lzw", "BigTIFF")],
    *[(tagged(number, COMPRESSION), "can't be decoded") for number in (2, 6, 7, 9999, 34712, 34925, 50000)],
    (tagged(60000, WIDTH, HEIGHT), "can't be decoded"),
]


@pytest.mark.parametrize(("content", "reason"), REFUSED)
def test_an_unusable_file_is_named(content: bytes, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Damaged, match=reason):
        read(content, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_pixels_that_have_their_ids_sha1_need_nothing_else_of_their_file(data: Data) -> None:
    tif, patch, other = first_tif(data), np.empty((96, 96, 3), np.uint8), np.empty((96, 96, 3), np.uint8)
    assert read_patch(tif, patch) == tif.stem == sha1(patch)
    tif.write_bytes(bytes(tif.stat().st_size - SIZE) + patch.tobytes())
    read_patch(tif, other)
    assert np.array_equal(other, patch)
    # Of an empty file, nothing is read: the array still holds the patch.
    for content in (b"", patch.tobytes()[:-1] + b"?"):
        tif.write_bytes(content)
        with pytest.raises(Damaged):
            read_patch(tif, other)


def test_any_bytes_are_a_patch_or_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    originals = [*EXACT.values(), *CHANGED.values(), tagged(50000, COMPRESSION)]
    n_damaged = 0
    for number in range(600):
        content = bytearray(originals[number % len(originals)])
        # The directory is at one of the ends.
        size = rng.integers(2, 300)
        content = content if number % 2 else content[:size]
        for place in (*rng.integers(2, min(300, len(content)) + 1, 3), len(content) - rng.integers(1, 200)):
            content[place : place + 8] = rng.choice([rng.bytes(8), b"\xff" * 8, b"\0" * 8, b""])
        try:
            read(content, tmp_path)
        except Damaged:
            n_damaged += 1
    assert 300 < n_damaged < 600
    assert capfd.readouterr() == ("", "")
