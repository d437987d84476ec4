"""Corrupted copies of patches, as `benchmarks.corruptions` writes them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as Pil

from benchmarks.corruptions import CORRUPTIONS, main
from pcam_kaggle.data.labelled import read_labelled
from pcam_kaggle.data.stain import Image


@pytest.fixture
def patch() -> Image:
    """A patch of smooth tissue colours."""
    coarse = np.random.default_rng(1).integers(60, 240, (12, 12, 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def test_corruptions_do_what_they_are_called(patch: Image) -> None:
    luma = np.array([0.299, 0.587, 0.114])
    values = patch.astype(float)
    made = {name: change(patch).astype(float) for name, change in CORRUPTIONS.items()}
    assert all((image != values).any() for image in made.values())
    np.testing.assert_allclose(made["brightness_0.8"], values * 0.8, atol=0.51)
    np.testing.assert_allclose(made["chroma_blur_1.5"][40:56, 40:56] @ luma, values[40:56, 40:56] @ luma, atol=12)
    grey = (values @ luma)[..., None]
    np.testing.assert_allclose(made["saturation_0.7"], grey + 0.7 * (values - grey), atol=1.5)
    assert np.std(made["noise_10"] - values) == pytest.approx(10, abs=0.5)
    # Haematoxylin absorbs more red than eosin does.
    assert made["more_haematoxylin"][..., 0].mean() < values[..., 0].mean() < made["more_eosin"][..., 0].mean()
    # Orange to yellow: hue turned by ten degrees.
    orange = np.full((96, 96, 3), (200, 100, 0), np.uint8)
    assert CORRUPTIONS["hue_+10"](orange)[0, 0].tolist() == pytest.approx([200, 133, 0], abs=4)


def test_each_folder_holds_the_corrupted_patches_under_the_same_ids(tmp_path: Path, patch: Image) -> None:
    (tmp_path / "patches").mkdir()
    pixels = {"a": patch, "b": patch[::-1].copy()}
    for name, image in pixels.items():
        Pil.fromarray(image).save(tmp_path / "patches" / f"{name}.tif")
    pd.DataFrame({"id": ["a", "b"], "label": [0, 1]}).to_csv(tmp_path / "labels.csv", index=False)
    main(tmp_path / "patches", tmp_path / "corrupted")
    assert {folder.name for folder in (tmp_path / "corrupted").iterdir()} == set(CORRUPTIONS)
    for name, corrupt in CORRUPTIONS.items():
        read = read_labelled(tmp_path / "corrupted" / name, tmp_path / "labels.csv", "names")
        np.testing.assert_array_equal(read.pixels, np.stack([corrupt(image) for image in pixels.values()]))
