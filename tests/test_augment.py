"""Augmentation keeps the label: nothing moves tumour into or out of the centre by more than the shift."""

import numpy as np
import pytest

from pcam_kaggle.data.stain import DENSITY, STAINS
from pcam_kaggle.training.augment import MAX_SHIFT, StainJitter, augmentation, center_crop

RANDOM = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
# The centre 32x32 is black and the rest white.
MARKED = np.full((96, 96, 3), 255, np.uint8)
MARKED[32:64, 32:64] = 0


@pytest.mark.parametrize("side", [64, 96])
def test_the_centre_moves_by_the_shift_at_most(side: int) -> None:
    augment = augmentation(side, 0.0, 0.0)
    augment.set_random_seed(0)
    moved = set()
    for _ in range(200):
        image = augment(image=MARKED)["image"]
        assert image.shape == (side, side, 3)
        rows, columns = np.nonzero(image[..., 0] == 0)
        assert (np.ptp(rows), np.ptp(columns)) == (31, 31)
        moved |= {rows.min() - (side - 32) // 2, columns.min() - (side - 32) // 2}
    assert moved == set(range(-MAX_SHIFT, MAX_SHIFT + 1))


def test_all_eight_symmetries_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_kaggle.training.augment.MAX_SHIFT", 0)
    augment = augmentation(96, 0.0, 0.0)
    augment.set_random_seed(0)
    seen = {augment(image=RANDOM)["image"].tobytes() for _ in range(200)}
    assert seen == {np.rot90(face, turns).tobytes() for face in (RANDOM, RANDOM[:, ::-1]) for turns in range(4)}


def test_stain_jitter_is_unmix_scale_mix() -> None:
    jitter, reference = StainJitter(0.2), StainJitter(0.2)
    for each in (jitter, reference):
        each.set_random_seed(5)
    factors = 1 + 0.2 * reference.random_generator.uniform(-1, 1, 3)
    offsets = 0.08 * reference.random_generator.uniform(-1, 1, 3)
    stains = DENSITY[RANDOM].astype(np.float64) @ np.linalg.inv(STAINS) * factors + offsets
    expected = np.clip(256 * np.exp(-(stains @ STAINS)) - 1, 0, 255)
    assert np.abs(jitter.apply(RANDOM, **jitter.get_params()) - expected).max() <= 0.51
    assert np.array_equal(StainJitter(0.0)(image=RANDOM)["image"], RANDOM)


def test_evaluation_sees_the_centre() -> None:
    patches = np.stack([MARKED, MARKED])
    assert center_crop(patches, 32).shape == (2, 32, 32, 3)
    assert not center_crop(patches, 32).any()
    assert center_crop(patches, 34).any()
