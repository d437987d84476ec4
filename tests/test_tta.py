"""The views are the square's symmetries, each once, and the filter takes fine colour detail away and nothing else."""

import cv2
import numpy as np
import pytest
import torch

from pcam_kaggle.training import tta


@pytest.fixture
def patches() -> torch.Tensor:
    """Two RGB patches in [0, 1] whose colours stay in the gamut when they are blurred."""
    return torch.rand(2, 3, 32, 32) * 0.3 + 0.35


def test_blurred_chroma_is_that_of_opencv(patches: torch.Tensor) -> None:
    levels = (patches * 255).round()
    ours = tta.blur_chroma(levels / 255, 1.5) * 255
    theirs = []
    for image in levels:
        converted = cv2.cvtColor(image.permute(1, 2, 0).numpy().astype(np.uint8), cv2.COLOR_RGB2YCrCb)
        converted[..., 1:] = cv2.GaussianBlur(converted, (0, 0), 1.5)[..., 1:]
        theirs.append(cv2.cvtColor(converted, cv2.COLOR_YCrCb2RGB))
    # OpenCV rounds luma and colour differences to whole levels, and cuts the Gaussian off after three standard deviations.
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1), np.stack(theirs), atol=2.5)
    assert torch.equal(tta.blur_chroma(patches, 0), patches)


def test_blurred_chroma_is_exact_under_autocast_and_stays_a_colour(patches: torch.Tensor) -> None:
    saturated = (patches > 0.5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blurred = tta.blur_chroma(saturated, 1.5)
    torch.testing.assert_close(blurred, tta.blur_chroma(saturated.double(), 1.5).float())
    assert (blurred.min(), blurred.max()) == (0, 1)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_views_are_turned_crops_in_the_memory_format_of_the_image(shift: int, memory_format: torch.memory_format) -> None:
    images = torch.rand(2, 3, 10, 10).to(memory_format=memory_format)
    padded = torch.nn.functional.pad(images, (shift,) * 4, mode="reflect")
    last = 2 * shift
    corners = [(0, 0), (0, last), (last, last), (last, 0)]
    crops = [padded[..., top : top + 10, left : left + 10] for top, left in corners]
    expected = [torch.rot90(crop, turns, (-2, -1)) for turns, crop in enumerate(crops)]
    expected += [torch.rot90(crops[(turns + 2) % 4].flip(-1), turns, (-2, -1)) for turns in range(4)]
    made = tta.views(images, 8, shift)
    assert all(map(torch.equal, made, expected))
    assert all(map(torch.equal, tta.views(images, 4, shift), expected[:4]))
    assert torch.equal(tta.views(images, 1, shift)[0], images)
    assert all(view.is_contiguous(memory_format=memory_format) for view in made)
