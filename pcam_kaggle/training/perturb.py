"""Fixed corruptions of the patches to predict, which show what a net relies on.

After PatchCamelyon-C (Zhang et al. 2022, "Benchmarking the robustness of deep neural networks to common corruptions in digital
pathology"), at one strength each, with two corruptions added that concern stains and colour detail.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pcam_kaggle.data.labelled import Patches
from pcam_kaggle.data.stain import Image, change, restain


def jpeg(image: Image, quality: int) -> Image:
    """Return `image` after JPEG compression at `quality` (0 to 100), with OpenCV's chroma subsampling of 4:2:0."""
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR_RGB))


def brightness(image: Image, factor: float) -> Image:
    """Return `image` with every value multiplied by `factor`."""
    return cv2.convertScaleAbs(image, alpha=factor)


def saturation(image: Image, factor: float) -> Image:
    """Return `image` with the distance of each pixel from its grey value multiplied by `factor`."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def hue(image: Image, degrees: int) -> Image:
    """Return `image` with the hue turned by `degrees`, an even number."""
    turned = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    turned[..., 0] = (turned[..., 0].astype(np.int16) + degrees // 2) % 180
    return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)


def defocus(image: Image, radius: float) -> Image:
    """Return `image` blurred by a disk of `radius` pixels."""
    reach = int(np.ceil(radius))
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    return cv2.filter2D(image, -1, disk / disk.sum())


def noise(image: Image, deviation: float) -> Image:
    """Return `image` with Gaussian noise of standard `deviation` grey levels, seeded by the image's content."""
    drawn = np.random.default_rng(zlib.crc32(image.tobytes())).normal(0, deviation, image.shape)
    return np.clip(np.rint(image + drawn), 0, 255).astype(np.uint8)


def chroma_blur(image: Image, sigma: float) -> Image:
    """Return `image` with the colour differences (YCrCb) blurred by a Gaussian of `sigma` pixels, and its luma unchanged."""
    converted = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    blurred = cv2.GaussianBlur(converted, (0, 0), sigma)
    blurred[..., 0] = converted[..., 0]
    return cv2.cvtColor(blurred, cv2.COLOR_YCrCb2RGB)


def stain_shift(image: Image, haematoxylin: float, eosin: float) -> Image:
    """Return `image` with the optical densities of its two stains multiplied by these factors."""
    return restain(image, change(np.array([haematoxylin, eosin, 1.0]), np.zeros(3)))


PERTURBATIONS: dict[str, partial[Image]] = {
    "jpeg_75": partial(jpeg, quality=75),
    "brightness_0.8": partial(brightness, factor=0.8),
    "brightness_1.2": partial(brightness, factor=1.2),
    "saturation_0.7": partial(saturation, factor=0.7),
    "saturation_1.3": partial(saturation, factor=1.3),
    "hue_-10": partial(hue, degrees=-10),
    "hue_+10": partial(hue, degrees=10),
    "defocus_1.5": partial(defocus, radius=1.5),
    "noise_10": partial(noise, deviation=10),
    "chroma_blur_1.5": partial(chroma_blur, sigma=1.5),
    "more_haematoxylin": partial(stain_shift, haematoxylin=1.25, eosin=0.8),
    "more_eosin": partial(stain_shift, haematoxylin=0.8, eosin=1.25),
}


@dataclass(frozen=True, slots=True)
class Perturbed:
    """The patches of `patches`, each changed by `change`."""

    patches: Patches
    change: Callable[[Image], Image]

    def images(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the changed patches in `rows` (n,): RGB uint8 (n, 96, 96, 3)."""
        return np.stack([self.change(image) for image in self.patches.images(rows)])
