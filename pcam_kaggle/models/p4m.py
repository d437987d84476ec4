"""Layers that are equivariant under the eight symmetries of the square: p4m group convolutions (Cohen & Welling 2016).

A feature map (n, 8 fields, h, w) contains eight copies of each field, one per symmetry: channel symmetry * fields + field. If
an image is rotated or reflected, its feature maps are as well, and the eight copies are permuted.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

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

    def __init__(self, channels: int) -> None:
        super().__init__(channels // ORDER)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise feature maps `x`; in training mode, also update the running statistics."""
        n, channels, height, width = x.shape
        # The copies as further positions, which moves nothing in channels_last.
        positions = x.permute(0, 2, 3, 1).reshape(n, height, ORDER * width, channels // ORDER).permute(0, 3, 1, 2)
        return super().forward(positions).permute(0, 2, 3, 1).reshape(n, height, width, channels).permute(0, 3, 1, 2)
