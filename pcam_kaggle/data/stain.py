"""Stains as optical densities: measured in a patch, changed, and mixed between patches."""

import cv2
import numpy as np
from numpy.typing import NDArray

Image = Images = NDArray[np.uint8]

# Optical density of each 8-bit level; the added one keeps black finite.
DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)

# Rows are the optical densities of haematoxylin, eosin and the residual in R, G, B (Ruifrok & Johnston 2001, table 1).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)
UNMIX = np.linalg.inv(STAINS)

# A mean density below which a pixel is glass (Macenko et al. 2009), and one below which a stain's strength is noise.
GLASS = 0.15
FAINT = 0.05
LEAST_TISSUE = 32


def change(factors: NDArray[np.float64], offsets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the map (3, 4) of optical densities that scales each stain by its factor (3,) and adds its offset (3,)."""
    affine = np.empty((3, 4))
    affine[:, :3] = ((UNMIX * factors) @ STAINS).T
    affine[:, 3] = offsets @ STAINS
    return affine


def restain(image: Image, affine: NDArray[np.float64]) -> Image:
    """Return `image` (h, w, 3) with `affine` (3, 4) applied to the optical density of every pixel."""
    light = cv2.exp(cv2.transform(cv2.LUT(image, DENSITY), -affine.astype(np.float32)))
    return cv2.addWeighted(light, 256, light, 0, -1, dtype=cv2.CV_8U)


def mix_stains(images: Images, chance: float, rng: np.random.Generator) -> Images:
    """Return `images` (n, h, w, 3), some as dark in haematoxylin and in eosin as others of them, or in between.

    Each is changed with `chance`. The strength of a stain is the 95th percentile of its density over every fourth pixel;
    factors are held to [0.5, 2]. After stain mix-up (Chang et al. 2021), with the stains' directions left as they are.
    """
    changed = rng.random(len(images)) < chance
    if not changed.any():
        return images
    density = DENSITY[images[:, ::4, ::4].reshape(len(images), -1, 3)]
    strengths = np.percentile(density @ UNMIX, 95, axis=1).clip(FAINT)
    share = np.where(changed, rng.random(len(images)), 0)[:, None]
    wanted = (1 - share) * strengths + share * strengths[rng.permutation(len(images))]
    factors = (wanted / strengths).clip(0.5, 2)
    factors[:, 2] = 1  # The residual is no stain.
    return np.stack([restain(image, change(each, np.zeros(3))) for image, each in zip(images, factors, strict=True)])


def stain_vectors(image: Image) -> NDArray[np.float64]:
    """Return the directions in optical density of a patch's two stains, unit vectors (2, 3) (Macenko et al. 2009).

    They are the 1st and 99th percentile of the angle in the plane that holds most of the density of tissue. A patch with
    hardly any tissue has those of Ruifrok & Johnston.
    """
    density = DENSITY[image[::3, ::3].reshape(-1, 3)].astype(np.float64)
    tissue = density[density.mean(1) > GLASS]
    if len(tissue) < LEAST_TISSUE:
        return STAINS[:2]
    plane = np.linalg.eigh(np.cov(tissue.T))[1][:, 1:]
    plane = plane * np.where(plane.sum(0) < 0, -1, 1)
    across = tissue @ plane
    low, high = np.percentile(np.arctan2(across[:, 0], across[:, 1]), [1, 99])
    vectors = np.array([[np.sin(angle), np.cos(angle)] for angle in (low, high)]) @ plane.T
    # Haematoxylin first: it takes more of the red.
    return vectors[np.argsort(-vectors[:, 0])]
