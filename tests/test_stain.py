"""Stains are measured where they were put, and a patch keeps its label's reasons when its stain changes."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from pcam_kaggle.data.folds import stain_groups
from pcam_kaggle.data.stain import STAINS, restain, stain_vectors


def stained(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a patch of two stains in random amounts, uint8 (96, 96, 3)."""
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0, 1.2, (96, 96, 2)) * (rng.random((96, 96, 2)) < 0.7)
    return np.clip(256 * np.exp(-(amounts @ vectors)) - 1, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_stain_vectors_are_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = STAINS[:2] + rng.normal(0, 0.05, (2, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = stain_vectors(stained(vectors, seed))
    assert (found * vectors).sum(1).min() > np.cos(np.radians(6))


def test_stain_vectors_do_not_depend_on_the_square() -> None:
    patch = stained(STAINS[:2])[:94, :94]
    for view in (patch[::-1], patch[:, ::-1], patch.transpose(1, 0, 2)):
        np.testing.assert_allclose(stain_vectors(view), stain_vectors(patch), atol=1e-6)


def test_glass_has_the_common_vectors() -> None:
    assert np.array_equal(stain_vectors(np.full((96, 96, 3), 245, np.uint8)), STAINS[:2])


def test_the_identity_changes_nothing() -> None:
    image = stained(STAINS[:2])
    assert np.array_equal(restain(image, np.eye(3, 4)), image)


def test_groups_of_like_stain_are_made_of_one_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_kaggle.data.folds.STAIN_GROUPS", 6)
    # Six slides, each with stains of its own.
    vectors = STAINS[:2] + np.random.default_rng(3).normal(0, 0.12, (6, 2, 3))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    slides, rows = np.arange(240) % 6, np.arange(240)
    patches = np.stack([stained(vectors[slide], number) for number, slide in enumerate(slides)])
    ids = np.array([f"patch_{number:03d}" for number in rows], dtype=object)
    store = SimpleNamespace(ids=lambda _: ids, rows=lambda *_: rows, images=lambda some: patches[some])
    groups = stain_groups(store)
    assert adjusted_rand_score(slides, groups["wsi"]) > 0.9
    assert sorted(groups["wsi"].unique()) == [f"stain_0{cluster}" for cluster in range(6)]
    assert stain_groups(store).equals(groups)
