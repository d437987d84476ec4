"""Layers of p4m against sums written out over coordinates, and nets that answer the same under the eight symmetries."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcam_kaggle.core.experiments import EXPERIMENTS
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.p4m import ORDER, GroupConv2d, GroupNorm2d, product_table, transform
from pcam_kaggle.training.tta import views

TURN, MIRROR = np.array([[0, -1], [1, 0]]), np.array([[1, 0], [0, -1]])
# Row and column offsets from the centre are mapped by these; a quarter turn to the left takes (0, 1), right, to (-1, 0), up.
MATRICES = [np.linalg.matrix_power(TURN, turns) @ face for face in (np.eye(2, dtype=int), MIRROR) for turns in range(4)]


def moved(image: np.ndarray, g: int) -> np.ndarray:
    """Return a square image, every pixel of which is carried to where matrix g takes its offset from the centre."""
    half = (image.shape[-1] - 1) / 2
    result = np.empty_like(image)
    for row, column in itertools.product(range(image.shape[-1]), repeat=2):
        to = MATRICES[g] @ (row - half, column - half) + half
        result[..., int(to[0]), int(to[1])] = image[..., row, column]
    return result


def correlated(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return the correlation of two square images, with zeros beyond the edge."""
    side, size = len(image), len(kernel)
    padded = np.pad(image, size // 2)
    return sum(kernel[i, j] * padded[i : i + side, j : j + side] for i, j in itertools.product(range(size), repeat=2))


def slow_group_conv(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return Cohen & Welling's equations 10 and 11 on x (symmetries, in fields, h, w).

    `weight` is (fields, in fields, symmetries, k, k).
    """
    out = np.zeros((ORDER, len(weight), *x.shape[2:]))
    lifts = weight.shape[2] == 1
    for g, field, source, h in itertools.product(range(ORDER), range(len(weight)), range(weight.shape[1]), range(len(x))):
        inverse = np.linalg.inv(MATRICES[g]).round().astype(int)
        slice_ = 0 if lifts else next(s for s, matrix in enumerate(MATRICES) if (matrix == inverse @ MATRICES[h]).all())
        out[g, field] += correlated(x[h, source], moved(weight[field, source, slice_], g))
    return out


def test_symmetries_are_those_of_the_views_and_form_a_group() -> None:
    image = torch.rand(1, 3, 6, 6)
    assert all(torch.equal(transform(image, g), view) for g, view in enumerate(views(image, 8, 0)))
    products = product_table()
    assert all(sorted(row.tolist()) == list(range(ORDER)) for row in (*products, *products.T))
    assert all(np.array_equal(moved(image.numpy(), g), transform(image, g).numpy()) for g in range(ORDER))


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("lifts", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_group_convolution_is_the_sum_over_the_group(kernel_size: int, lifts: bool, mode: bool) -> None:
    symmetries = 1 if lifts else ORDER
    layer = GroupConv2d(2 * symmetries, 3 * ORDER, kernel_size, lifts=lifts).double().train(mode)
    x = torch.rand(1, 2 * symmetries, 6, 6, dtype=torch.float64)
    weight = layer.weight.detach().view(3, 2, symmetries, kernel_size, kernel_size).numpy()
    expected = slow_group_conv(x.view(symmetries, 2, 6, 6).numpy(), weight)
    np.testing.assert_allclose(layer(x).detach().view(ORDER, 3, 6, 6).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_group_norm_is_batch_norm_over_the_copies(memory_format: torch.memory_format) -> None:
    layer, reference = GroupNorm2d(3 * ORDER).double(), nn.BatchNorm2d(3).double()
    for norm in (layer, reference):
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, -0.5)

    def slow(x: Tensor) -> Tensor:
        pixels = x.unflatten(1, (ORDER, 3)).permute(0, 2, 1, 3, 4)
        return reference(pixels.flatten(2, 3)).unflatten(2, (ORDER, -1)).permute(0, 2, 1, 3, 4).flatten(1, 2)

    x = (torch.randn(4, 3 * ORDER, 6, 6, dtype=torch.float64) * 3 + 1).to(memory_format=memory_format)
    x = x + torch.arange(3 * ORDER).view(1, -1, 1, 1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradient = torch.randn_like(x)
    for _ in range(2):
        first, second = layer(ours), slow(theirs)
        torch.testing.assert_close(first, second)
        first.backward(gradient)
        second.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    torch.testing.assert_close([each.grad for each in layer.parameters()], [each.grad for each in reference.parameters()])
    reference.eval()
    torch.testing.assert_close(layer.eval()(x), slow(x))


def test_logits_are_the_same_under_the_eight_symmetries() -> None:
    net = create(EXPERIMENTS["bottleneck_d4"].config)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, GroupNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        for _ in range(3):
            net(torch.rand(8, 3, 96, 96))
    images = torch.rand(4, 3, 96, 96) * torch.linspace(0.2, 1, 4).view(4, 1, 1, 1)
    net.eval()
    logits = torch.stack([net(view) for view in views(images, 8, 0)])
    assert logits.std(1).min() > 1e-2
    assert (logits - logits[0]).abs().max() < 1e-4
    ordinary = create(EXPERIMENTS["bottleneck"].config).eval()
    assert (ordinary(images) - ordinary(images.flip(3))).abs().max() > 1e-4
