"""A net with folded batch norms predicts what the net does, and leaves it as it is."""

from typing import Any

import pytest
import torch
from torch import nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.folded import MaxPool, fold_norms

NETS: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "d4": {"symmetry": "d4"},
    "plain": {"body": "plain", "head": "flatten"},
    "plain_d4": {"body": "plain", "symmetry": "d4"},
    "same width": {"width": 32, "max_width": 32},
}


def trained(**fields: Any) -> nn.Module:
    """Return a net whose norms have statistics, scales and shifts as after a training; some scales are negative."""
    torch.manual_seed(0)
    net = create(Config(**{"n_blocks": 3, "width": 16, "max_width": 64, **fields}))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net


@pytest.mark.parametrize("fields", NETS.values(), ids=NETS)
def test_the_copy_computes_the_same_without_norms_and_pooling_indices(fields: dict[str, Any]) -> None:
    net = trained(**fields)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    folded = fold_norms(net)
    left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    # A stem that pools first keeps its norm.
    assert len(left) == (0 if fields.get("body") == "plain" else 1)
    assert not any(isinstance(module, nn.MaxPool2d) for module in folded.modules())
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert any(isinstance(module, nn.MaxPool2d) for module in net.modules())
    images = torch.rand(4, 3, 96, 96).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = net(images)
        torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 9), (1, 5, 2, 3)])
def test_pooling_is_that_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(MaxPool()(x), nn.functional.max_pool2d(x, 2))
