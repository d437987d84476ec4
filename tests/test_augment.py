"""Augmentation keeps the label: nothing moves tumour into or out of the centre by more than the shift."""

import albumentations as A
import cv2
import numpy as np
import pytest

from pcam_kaggle.data.stain import DENSITY, STAINS
from pcam_kaggle.training.augment import MAX_SHIFT, ShiftedCrop, SquareSymmetry, StainJitter, augmentation, center_crop


def marked() -> np.ndarray:
    """Return a patch whose centre 32x32 is black and whose rest is white."""
    patch = np.full((96, 96, 3), 255, np.uint8)
    patch[32:64, 32:64] = 0
    return patch


@pytest.mark.parametrize("side", [64, 96])
def test_the_centre_moves_by_the_shift_at_most(side: int) -> None:
    augment = augmentation(side, 0.0, 0.0)
    augment.set_random_seed(0)
    moved = set()
    for _ in range(200):
        image = augment(image=marked())["image"]
        assert image.shape == (side, side, 3)
        rows, columns = np.nonzero(image[..., 0] == 0)
        assert (np.ptp(rows), np.ptp(columns)) == (31, 31)
        moved |= {rows.min() - (side - 32) // 2, columns.min() - (side - 32) // 2}
    assert moved == set(range(-MAX_SHIFT, MAX_SHIFT + 1))


@pytest.mark.parametrize("side", [64, 90, 96])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_the_shift_is_the_crops_that_albumentations_draws(side: int, shift: int) -> None:
    patch = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    reach = side + 2 * shift
    padded = A.CenterCrop(reach, reach, pad_if_needed=True, border_mode=cv2.BORDER_REFLECT_101)
    ours, theirs = A.Compose([ShiftedCrop(side, shift)]), A.Compose([padded, A.RandomCrop(side, side)])
    for transform in (ours, theirs):
        transform.set_random_seed(3)
    assert all(np.array_equal(ours(image=patch)["image"], theirs(image=patch)["image"]) for _ in range(50))


def test_all_eight_symmetries_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_kaggle.training.augment.MAX_SHIFT", 0)
    patch = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    augment = augmentation(96, 0.0, 0.0)
    augment.set_random_seed(0)
    seen = {augment(image=patch)["image"].tobytes() for _ in range(200)}
    assert seen == {np.rot90(face, turns).tobytes() for face in (patch, patch[:, ::-1]) for turns in range(4)}


def test_the_symmetry_is_the_one_that_albumentations_draws() -> None:
    patch = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    ours, theirs = SquareSymmetry(p=1.0), A.D4(p=1.0)
    for transform in (ours, theirs):
        transform.set_random_seed(3)
    assert all(np.array_equal(ours(image=patch)["image"], theirs(image=patch)["image"]) for _ in range(50))


def test_same_seed_same_patches() -> None:
    patch = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    augment = augmentation(96, 0.1, 0.1)

    def drawn(seed: int) -> list[bytes]:
        augment.set_random_seed(seed)
        return [augment(image=patch)["image"].tobytes() for _ in range(5)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert len(set(drawn(3))) == 5


def test_stain_jitter_is_unmix_scale_mix() -> None:
    patch = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    jitter = StainJitter(0.2)
    jitter.set_random_seed(5)
    reference = StainJitter(0.2)
    reference.set_random_seed(5)
    factors = 1 + 0.2 * reference.random_generator.uniform(-1, 1, 3)
    offsets = 0.08 * reference.random_generator.uniform(-1, 1, 3)
    stains = DENSITY[patch].astype(np.float64) @ np.linalg.inv(STAINS) * factors + offsets
    expected = np.clip(256 * np.exp(-(stains @ STAINS)) - 1, 0, 255)
    affine = StainJitter(0.2)
    affine.set_random_seed(5)
    assert np.abs(jitter.apply(patch, **affine.get_params()) - expected).max() <= 0.51


def test_stain_jitter_of_nothing_is_nothing() -> None:
    patch = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert np.array_equal(StainJitter(0.0)(image=patch)["image"], patch)


def test_evaluation_sees_the_centre() -> None:
    patches = np.stack([marked(), marked()])
    assert center_crop(patches, 32).shape == (2, 32, 32, 3)
    assert not center_crop(patches, 32).any()
    assert center_crop(patches, 34).any()
