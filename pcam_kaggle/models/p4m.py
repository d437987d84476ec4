"""Layers that are equivariant under the eight symmetries of the square: p4m group convolutions (Cohen & Welling 2016).

A feature map (n, 8 fields, h, w) contains eight copies of each field, one per symmetry: channel symmetry * fields + field. If
an image is rotated or reflected, its feature maps are as well, and the eight copies are permuted.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d

ORDER = 8


def transform(images: Tensor, symmetry: int) -> Tensor:
    """Apply a symmetry to `images` (…, side, side): 0 to 3 are rotations by quarter turns, 4 to 7 those of the mirror image."""
    return torch.rot90(images.flip(-1) if symmetry >= 4 else images, symmetry % 4, (-2, -1))


def product_table() -> Tensor:
    """Return the product table of the group, int64 (8, 8): entry (a, b) is the symmetry that applies b and then a."""
    probe = torch.arange(4).view(2, 2)
    moved = [transform(probe, symmetry).flatten().tolist() for symmetry in range(ORDER)]
    return torch.tensor(
        [[moved.index(transform(transform(probe, b), a).flatten().tolist()) for b in range(ORDER)] for a in range(ORDER)]
    )


def filter_index(kernel_size: int, lifts: bool) -> Tensor:
    """Return the flat positions in a filter from which its values under each symmetry are gathered.

    The result is int64 (8, input symmetries, k, k); the input is an image (`lifts`) or a feature map with eight. Under symmetry
    g the filter is transformed like an image, and its slice for h is that for g⁻¹h (Cohen & Welling 2016, section 6.2).
    """
    symmetries = 1 if lifts else ORDER
    positions = torch.arange(symmetries * kernel_size**2).view(symmetries, kernel_size, kernel_size)
    sources = torch.zeros(ORDER, 1, dtype=torch.int64) if lifts else product_table().argsort(1)
    return torch.stack([transform(positions[source], g) for g, source in enumerate(sources)])


class GroupConv2d(nn.Module):
    """Group convolution that keeps the side: (n, in_channels, h, w) to (n, channels, h, w).

    `channels` and `in_channels` count all copies and must be multiples of 8; with `lifts` the input is an image of any number
    of channels. The weight is (channels / 8, input fields, input symmetries times k²), an eighth of an ordinary convolution's.
    """

    index: Tensor

    def __init__(self, in_channels: int, channels: int, kernel_size: int, lifts: bool = False) -> None:
        super().__init__()
        symmetries = 1 if lifts else ORDER
        self.padding = kernel_size // 2
        fields, in_fields = channels // ORDER, in_channels // symmetries
        self.weight = nn.Parameter(torch.empty(fields, in_fields, symmetries * kernel_size**2))
        # The variance of He et al. 2015 (equation 14), as for an ordinary convolution with these channels.
        nn.init.normal_(self.weight, std=(2 / (channels * kernel_size**2)) ** 0.5)
        self.register_buffer("index", filter_index(kernel_size, lifts), persistent=False)

    def filters(self) -> Tensor:
        """Return the filters of the equivalent ordinary convolution, (channels, in_channels, k, k)."""
        gathered = self.weight.permute(2, 0, 1)[self.index]
        return gathered.permute(0, 4, 1, 5, 2, 3).flatten(2, 3).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images or feature maps `x`."""
        return conv2d(x, self.filters(), padding=self.padding)


class GroupNorm2d(nn.BatchNorm2d):
    """Batch norm of feature maps (n, channels, h, w) with one mean, variance, scale and shift for the copies of a field."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int) -> None:
        super().__init__(channels // ORDER)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise feature maps `x`; in training mode, also update the running statistics."""
        if not self.training:
            means, variances = self.running_mean.repeat(ORDER), self.running_var.repeat(ORDER)
            return batch_norm(x, means, variances, self.weight.repeat(ORDER), self.bias.repeat(ORDER), eps=self.eps)
        with torch.no_grad():
            # PyTorch's kernel is slow on few channels, so it gets all of them, and the statistics of the copies are pooled.
            statistics = torch.batch_norm_update_stats(x, None, None, 0.0)
            means, variances = (each.to(self.weight.dtype).view(ORDER, -1) for each in statistics)
            mean = means.mean(0)
            variance = (variances + (means - mean) ** 2).mean(0)
            count = x.numel() / self.num_features
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return _GroupNormalize.apply(x, self.weight, self.bias, mean, variance, self.eps)


class _GroupNormalize(torch.autograd.Function):
    """Batch norm with pooled statistics; its gradient is that of Ioffe & Szegedy 2015 (section 3) with sums over the copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        mean, variance, weight, bias = (each.repeat(ORDER) for each in (mean, variance, weight, bias))
        return batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        repeated = [each.repeat(ORDER) for each in (weight, mean, variance)]
        # The statistics are taken as constants first; their part of the gradient of x is linear in x and follows from the sums.
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, *repeated, None, None, False, ctx.eps, [True, True, True]
        )
        of_weight, of_bias = of_weight.view(ORDER, -1).sum(0), of_bias.view(ORDER, -1).sum(0)
        scale = weight * (variance + ctx.eps).rsqrt() * len(weight) / x.numel()
        slope = -scale * (variance + ctx.eps).rsqrt() * of_weight
        offset = -scale * of_bias - slope * mean
        slope, offset = (each.repeat(ORDER).view(1, -1, 1, 1).to(x.dtype) for each in (slope, offset))
        return of_x.addcmul_(x, slope).add_(offset), of_weight, of_bias, None, None, None
