"""A lack of memory in prediction: fewer patches at a time give the same probabilities, and none at all is one error."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.factory import create
from pcam_kaggle.training import engine
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.embed import mean_features
from pcam_kaggle.training.predict import predict_probabilities

CPU = Backend("cpu", "fp32", "channels_last")
ROWS = np.arange(60)
PIXELS = np.random.default_rng(0).integers(np.arange(60).reshape(-1, 1, 1, 1), 256, (60, 96, 96, 3), np.uint8)
LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    MemoryError(),
]
Limit = Callable[..., None]


class Patches:
    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return PIXELS[rows]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Return a function that leaves memory for so many patches at a time, and raises `error` if there are more."""
    images = Backend.images
    monkeypatch.setattr(engine, "_fitting", {})

    def set_limit(most: int, error: Exception = LACKS[0]) -> None:
        def limited(self: Backend, patches: Tensor) -> Tensor:
            if len(patches) > most:
                raise error
            return images(self, patches)

        monkeypatch.setattr(Backend, "images", limited)

    return set_limit


@pytest.mark.parametrize("norm", ["train", "test"])
def test_fewer_patches_at_a_time_have_the_same_probabilities(
    norm: str, limit: Limit, tiny: Config, package_log: pytest.LogCaptureFixture
) -> None:
    config = replace(tiny, tta=1, norm=norm)
    net = create(config)
    expected = predict_probabilities(net, Patches(), ROWS, config, CPU, "")
    assert expected.std() > 1e-3
    for most, size in ((15, 15), (4, 3)):
        limit(most)
        for _ in range(2):
            found = predict_probabilities(net, Patches(), ROWS, config, CPU, "")
            if norm == "train":
                np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
            # Means over statistics of fewer patches are estimates of the same.
            assert np.corrcoef(found, expected)[0, 1] > 0.99
        (warning,) = (line for line in package_log.messages if "at a time" in line)
        assert f"predicts {size} patches" in warning
        package_log.clear()


@pytest.mark.parametrize("error", LACKS, ids=repr)
def test_memory_for_no_patch_is_one_error_that_names_the_model(error: Exception, limit: Limit, tiny: Config) -> None:
    probed = Config(model="timm:resnet10t", side=64)
    limit(0, error)
    with pytest.raises(UserError, match=r"^model=cnn: too large for the device's memory; use a smaller one$"):
        predict_probabilities(create(tiny), Patches(), ROWS, tiny, CPU, "")
    with pytest.raises(UserError, match=r"^model=timm:resnet10t: too large for the device's memory"):
        mean_features(create(probed).eval(), Patches(), ROWS, probed, CPU)


def test_another_error_is_raised_as_it_is(limit: Limit, tiny: Config) -> None:
    limit(0, RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match=r"^a shape is wrong$"):
        predict_probabilities(create(tiny), Patches(), ROWS, tiny, CPU, "")
