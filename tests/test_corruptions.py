"""Corruptions of a patch by `benchmarks.corruptions`."""

import numpy as np
import pytest

from benchmarks.corruptions import CORRUPTIONS


def test_corruptions_do_what_they_are_called() -> None:
    # A patch of smooth tissue colours.
    coarse = np.random.default_rng(1).integers(60, 240, (12, 12, 3)).astype(np.uint8)
    patch = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
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
