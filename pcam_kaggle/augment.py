"""What may change in a patch without changing its label, on uint8 images."""

from typing import Any

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

# Optical density of each 8-bit level; the added one keeps black finite.
DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)

# Rows are the optical densities of haematoxylin, eosin and the residual in R, G, B (Ruifrok & Johnston 2001, table 1).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)


class StainJitter(A.ImageOnlyTransform):
    """Multiply each stain's density by a random factor and add a random offset (Tellez et al. 2018, section III-B).

    Factors are uniform in 1 ± `strength`, offsets in ± 0.4 `strength` of an optical density. Unmixing, change and mixing
    are one affine map of the optical density. uint8 RGB in and out, any size.
    """

    def __init__(self, strength: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.strength = strength

    def get_params(self) -> dict[str, Any]:
        """Draw the factor and the offset of each stain."""
        factors = 1 + self.strength * self.random_generator.uniform(-1, 1, 3)
        offsets = 0.4 * self.strength * self.random_generator.uniform(-1, 1, 3)
        matrix = np.linalg.inv(STAINS) @ np.diag(factors) @ STAINS
        affine = np.column_stack([matrix.T, offsets @ STAINS]).astype(np.float32)
        return {"affine": affine}

    def apply(self, img: Image, affine: NDArray[np.float32], **params: Any) -> Image:
        """Return `img` with the drawn map applied to its optical density."""
        light = cv2.exp(-cv2.transform(DENSITY[img], affine)) * 256 - 1
        return np.clip(np.rint(light), 0, 255).astype(np.uint8)


def augmentation(side: int, shift: int, stain_jitter: float, color_jitter: float) -> A.Compose:
    """Return the random augmentation of one train patch: uint8 (96, 96, 3) in, uint8 (side, side, 3) out.

    The centre moves by at most `shift` px on each axis, then one of the square's eight symmetries, then stain and colour.
    Beyond the patch's edge lies its reflection.
    """
    reach = side + 2 * shift
    return A.Compose(
        [
            A.CenterCrop(reach, reach, pad_if_needed=True, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(side, side),
            A.D4(p=1.0),
            StainJitter(stain_jitter),
            A.ColorJitter(
                brightness=(1 - color_jitter, 1 + color_jitter),
                contrast=(1 - color_jitter, 1 + color_jitter),
                saturation=(1 - color_jitter, 1 + color_jitter),
                hue=(0.0, 0.0),
                p=1.0,
            ),
        ]
    )


def centre(images: Image, side: int) -> Image:
    """Return the centre square of `side` px of `images` (…, height, width, 3): what evaluation sees."""
    top, left = (images.shape[-3] - side) // 2, (images.shape[-2] - side) // 2
    return images[..., top : top + side, left : left + side, :]
