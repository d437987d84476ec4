"""Augmentation: random changes of a uint8 RGB patch that keep its label, which is that of the centre square of 32 px."""

from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from pcam_kaggle.data.stain import Image, Images, change, restain

# Pixels; small, because only tumour in the centre square decides the label.
MAX_SHIFT = 4
# Largest offset of a stain's optical density, relative to the strength of the jitter.
STAIN_OFFSET = 0.4
# The dihedral group D4, by the names of albumentations.
SYMMETRIES: dict[str, Callable[[Image], Image]] = {
    "e": lambda image: image,
    "r90": lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
    "r180": lambda image: cv2.rotate(image, cv2.ROTATE_180),
    "r270": lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    "v": lambda image: cv2.flip(image, 0),
    "h": lambda image: cv2.flip(image, 1),
    "t": cv2.transpose,
    "hvt": lambda image: cv2.transpose(cv2.rotate(image, cv2.ROTATE_180)),
}


def augmentation(side: int, stain_jitter: float, color_jitter: float) -> A.Compose:
    """Return the random augmentation of a train patch: uint8 (96, 96, 3) in, uint8 (side, side, 3) out; strengths in [0, 1)."""
    factors = (1 - color_jitter, 1 + color_jitter)
    return A.Compose(
        [
            ShiftedCrop(side, MAX_SHIFT),
            SquareSymmetry(p=1.0),
            StainJitter(stain_jitter),
            A.ColorJitter(brightness=factors, contrast=factors, saturation=factors, hue=(0.0, 0.0), p=1.0),
        ],
        # With a single image there are no shapes to compare.
        is_check_shapes=False,
    )


class ShiftedCrop(A.ImageOnlyTransform):
    """albumentations' CenterCrop to `side` + 2 `max_shift` px, reflecting, and RandomCrop, in a quarter of the time."""

    def __init__(self, side: int, max_shift: int) -> None:
        super().__init__(p=1.0)
        self.side, self.max_shift = side, max_shift

    def get_params(self) -> dict[str, int]:
        """Draw the position of the crop, from 0 to 2 `max_shift`; `max_shift` is the centre."""
        return {name: int((2 * self.max_shift + 1) * self.py_random.random()) for name in ("down", "right")}

    def apply(self, img: Image, down: int, right: int, **params: Any) -> Image:
        """Return the crop (side, side, 3) of `img` (h, w, 3) at the drawn position."""
        padded = cv2.copyMakeBorder(img, *(self.max_shift,) * 4, cv2.BORDER_REFLECT_101)
        top, left = (img.shape[0] - self.side) // 2 + down, (img.shape[1] - self.side) // 2 + right
        return padded[top : top + self.side, left : left + self.side]


class SquareSymmetry(A.D4):
    """albumentations' D4, rotations and reflections of the square, with the same draws and pixels in a third of the time."""

    def apply(self, img: Image, group_element: str, **params: Any) -> Image:
        """Return `img` under the drawn symmetry."""
        return SYMMETRIES[group_element](img)


class StainJitter(A.ImageOnlyTransform):
    """Scale stains by 1 ± `strength` and shift their density by ± 0.4 `strength` (Tellez et al. 2018, section III-B)."""

    def __init__(self, strength: float) -> None:
        super().__init__(p=1.0)
        self.strength = strength

    def get_params(self) -> dict[str, Any]:
        """Draw factors and offsets of the stains; return their affine map of optical densities, float64 (3, 4)."""
        factors = 1 + self.strength * self.random_generator.uniform(-1, 1, 3)
        offsets = STAIN_OFFSET * self.strength * self.random_generator.uniform(-1, 1, 3)
        return {"affine": change(factors, offsets)}

    def apply(self, img: Image, affine: NDArray[np.float64], **params: Any) -> Image:
        """Return `img` (h, w, 3) under the drawn map."""
        return restain(img, affine)


def center_crop(images: Images, side: int) -> Images:
    """Return the centre squares (..., side, side, 3) of `images` (..., h, w, 3), on which a model predicts."""
    top, left = (images.shape[-3] - side) // 2, (images.shape[-2] - side) // 2
    return images[..., top : top + side, left : left + side, :]
