"""Copies of a folder of patches under fixed corruptions, which show what a model relies on.

`python -m benchmarks.corruptions PATCHES TARGET` writes TARGET/<corruption>/<id>.tif, which `pcam evaluate --patches
TARGET/<corruption> --ids names` scores. After PatchCamelyon-C (Zhang et al. 2022, "Benchmarking the robustness of deep neural
networks to common corruptions in digital pathology"), at one strength each, with two added for stains and colour detail.
"""

import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import PIL.Image

from pcam_kaggle.data.stain import Image, change, restain


def jpeg(image: Image, quality: int) -> Image:
    """Compress at `quality` (0 to 100), with OpenCV's chroma subsampling of 4:2:0."""
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR_RGB))


def saturation(image: Image, factor: float) -> Image:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def hue(image: Image, degrees: int) -> Image:
    turned = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    turned[..., 0] = (turned[..., 0].astype(np.int16) + degrees // 2) % 180
    return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)


def defocus(image: Image, radius: float) -> Image:
    offsets = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    return cv2.filter2D(image, -1, disk / disk.sum())


def noise(image: Image, deviation: float) -> Image:
    """Add Gaussian noise of standard `deviation` grey levels, seeded by the image's content."""
    drawn = np.random.default_rng(zlib.crc32(image.tobytes())).normal(0, deviation, image.shape)
    return np.clip(np.rint(image + drawn), 0, 255).astype(np.uint8)


def chroma_blur(image: Image, sigma: float) -> Image:
    """Blur the colour differences (YCrCb) by a Gaussian of `sigma` pixels, and leave the luma unchanged."""
    converted = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    blurred = cv2.GaussianBlur(converted, (0, 0), sigma)
    blurred[..., 0] = converted[..., 0]
    return cv2.cvtColor(blurred, cv2.COLOR_YCrCb2RGB)


def stain_shift(image: Image, haematoxylin: float, eosin: float) -> Image:
    return restain(image, change(np.array([haematoxylin, eosin, 1.0]), np.zeros(3)))


# Each maps RGB uint8 (h, w, 3) to the same shape.
CORRUPTIONS: dict[str, Callable[[Image], Image]] = {
    "jpeg_75": partial(jpeg, quality=75),
    **{f"brightness_{factor}": partial(cv2.convertScaleAbs, alpha=factor) for factor in (0.8, 1.2)},
    **{f"saturation_{factor}": partial(saturation, factor=factor) for factor in (0.7, 1.3)},
    **{f"hue_{degrees:+}": partial(hue, degrees=degrees) for degrees in (-10, 10)},
    "defocus_1.5": partial(defocus, radius=1.5),
    "noise_10": partial(noise, deviation=10),
    "chroma_blur_1.5": partial(chroma_blur, sigma=1.5),
    "more_haematoxylin": partial(stain_shift, haematoxylin=1.25, eosin=0.8),
    "more_eosin": partial(stain_shift, haematoxylin=0.8, eosin=1.25),
}


def main(patches: Path, target: Path) -> None:
    """Write a copy of the TIFs in `patches` to the new folder `target` for each corruption."""
    for name, corrupt in CORRUPTIONS.items():
        (target / name).mkdir(parents=True)
        for file in patches.glob("*.tif"):
            with PIL.Image.open(file) as patch:
                PIL.Image.fromarray(corrupt(np.array(patch))).save(target / name / file.name)


if __name__ == "__main__":
    if len(sys.argv) != 3 or Path(sys.argv[2]).exists():
        sys.exit("usage: python -m benchmarks.corruptions PATCHES NEW_FOLDER")
    main(*map(Path, sys.argv[1:]))
