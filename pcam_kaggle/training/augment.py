"""Augmentation: random changes of a uint8 RGB patch that keep its label, which is that of the centre square of 32 px."""

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


def augmentation(side: int, stain_jitter: float, color_jitter: float) -> A.Compose:
    """Return the random augmentation of a train patch: uint8 (96, 96, 3) in, uint8 (side, side, 3) out; strengths in [0, 1)."""
    factors, reach = (1 - color_jitter, 1 + color_jitter), side + 2 * MAX_SHIFT
    return A.Compose(
        [
            A.CenterCrop(reach, reach, pad_if_needed=True, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(side, side),
            A.D4(p=1.0),
            StainJitter(stain_jitter),
            A.ColorJitter(brightness=factors, contrast=factors, saturation=factors, hue=(0.0, 0.0), p=1.0),
        ],
        # With a single image there are no shapes to compare.
        is_check_shapes=False,
    )


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
