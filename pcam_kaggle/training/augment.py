"""What may change in a patch without changing its label, on uint8 images."""

from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from pcam_kaggle.data.stain import Image, Images, change, restain

Targets = NDArray[np.float32]

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


class Shift(A.ImageOnlyTransform):
    """Crop a square of `side` px, its centre moved by at most `reach` px on each axis; beyond the edge lies the reflection.

    The same draws and the same pixels as albumentations' CenterCrop, padded, and then RandomCrop, in a quarter of the time.
    """

    def __init__(self, side: int, reach: int, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.side, self.reach = side, reach

    def get_params(self) -> dict[str, int]:
        """Draw the move down and to the right, from 0 to twice the reach."""
        down, right = (int((2 * self.reach + 1) * self.py_random.random()) for _ in range(2))
        return {"down": down, "right": right}

    def apply(self, img: Image, down: int, right: int, **params: Any) -> Image:
        """Return the square of `img` that was drawn."""
        around = cv2.copyMakeBorder(img, *[self.reach] * 4, cv2.BORDER_REFLECT_101)
        top, left = (img.shape[0] - self.side) // 2 + down, (img.shape[1] - self.side) // 2 + right
        return around[top : top + self.side, left : left + self.side]


class Symmetry(A.D4):
    """albumentations' D4, the same draws and the same pixels, copied by OpenCV in a third of the time of numpy's strides."""

    def apply(self, img: Image, group_element: str, **params: Any) -> Image:
        """Return `img` under the symmetry that was drawn."""
        return SYMMETRIES[group_element](img)


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
        return {"affine": change(factors, offsets)}

    def apply(self, img: Image, affine: NDArray[np.float64], **params: Any) -> Image:
        """Return `img` with the drawn map applied to its optical density."""
        return restain(img, affine)


def augmentation(side: int, shift: int, stain_jitter: float, color_jitter: float, degrade: float) -> A.Compose:
    """Return the random augmentation of one train patch: uint8 (96, 96, 3) in, uint8 (side, side, 3) out.

    The centre moves by at most `shift` px on each axis, then one of the square's eight symmetries, then stain and colour,
    then, each with the chance `degrade`, a blur and a JPEG's losses. Beyond the patch's edge lies its reflection.
    """
    return A.Compose(
        [
            Shift(side, shift),
            Symmetry(p=1.0),
            StainJitter(stain_jitter),
            A.ColorJitter(
                brightness=(1 - color_jitter, 1 + color_jitter),
                contrast=(1 - color_jitter, 1 + color_jitter),
                saturation=(1 - color_jitter, 1 + color_jitter),
                hue=(0.0, 0.0),
                p=1.0,
            ),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.2), p=degrade),
            A.ImageCompression(quality_range=(40, 95), p=degrade),
        ],
        # There is nothing beside the image whose shape could differ.
        is_check_shapes=False,
    )


def mixup(images: Images, targets: Targets, alpha: float, rng: np.random.Generator) -> tuple[Images, Targets]:
    """Return `images` (n, h, w, 3) and `targets` (n,) mixed pairwise by a share from Beta(alpha, alpha) (Zhang et al. 2018)."""
    if not alpha:
        return images, targets
    share, partners = np.float32(rng.beta(alpha, alpha)), rng.permutation(len(images))
    mixed = cv2.addWeighted(images.reshape(-1), float(share), images[partners].reshape(-1), float(1 - share), 0)
    return mixed.reshape(images.shape), share * targets + (1 - share) * targets[partners]


def centre(images: Images, side: int) -> Images:
    """Return the centre square of `side` px of `images` (…, height, width, 3): what evaluation sees."""
    top, left = (images.shape[-3] - side) // 2, (images.shape[-2] - side) // 2
    return images[..., top : top + side, left : left + side, :]
