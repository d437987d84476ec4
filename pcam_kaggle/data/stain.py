"""Stains of a patch as optical densities: estimation and change."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# uint8; not stated because OpenCV's annotations leave the dtype open.
Image = NDArray[Any]
Images = NDArray[Any]

# Optical density of each 8-bit level; one is added to keep black finite.
DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
# Rows are the optical densities of haematoxylin, eosin and the residual in R, G, B (Ruifrok & Johnston 2001, table 1).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)
UNMIX = np.linalg.inv(STAINS)
# Pixels of a lower mean density are glass (Macenko et al. 2009).
GLASS_DENSITY = 0.15
MIN_TISSUE_PIXELS = 32


def change(factors: NDArray[np.float64], offsets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the affine map (3, 4) of optical densities that scales each stain by its factor and adds its offset.

    `factors` (3,) are of haematoxylin, eosin and residual, `offsets` (3,) of the same, in units of density.
    """
    affine = np.empty((3, 4))
    affine[:, :3] = ((UNMIX * factors) @ STAINS).T
    affine[:, 3] = offsets @ STAINS
    return affine


def restain(image: Image, affine: NDArray[np.float64]) -> Image:
    """Return `image` (h, w, 3) with `affine` (3, 4) applied to the optical density of every pixel."""
    light = cv2.exp(cv2.transform(cv2.LUT(image, DENSITY), -affine.astype(np.float32)))
    return cv2.addWeighted(light, 256, light, 0, -1, dtype=cv2.CV_8U)


def stain_vectors(image: Image) -> NDArray[np.float64]:
    """Estimate the stain vectors of `image`, RGB uint8 (h, w, 3) (Macenko et al. 2009).

    They are at the 1st and 99th percentile of the angle in the plane of the first two principal components of the tissue's
    optical density. For a patch with hardly any tissue they are those of Ruifrok & Johnston. Returns unit vectors of
    haematoxylin and eosin in optical density of R, G, B, float64 (2, 3).
    """
    density = DENSITY[image[::3, ::3].reshape(-1, 3)].astype(np.float64)
    tissue = density[density.mean(1) > GLASS_DENSITY]
    if len(tissue) < MIN_TISSUE_PIXELS:
        return STAINS[:2]
    plane = np.linalg.eigh(np.cov(tissue.T))[1][:, 1:]
    plane = plane * np.where(plane.sum(0) < 0, -1, 1)
    across = tissue @ plane
    low, high = np.percentile(np.arctan2(across[:, 0], across[:, 1]), [1, 99])
    vectors = np.array([[np.sin(angle), np.cos(angle)] for angle in (low, high)]) @ plane.T
    # Haematoxylin first: it absorbs more red.
    return vectors[np.argsort(-vectors[:, 0])]
