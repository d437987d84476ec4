"""Blocks of the CNN, ordinary or equivariant: layer types, pooling, and the two bodies of a block."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pcam_kaggle.models.p4m import ORDER, GroupConv2d, GroupNorm2d

POOL_SIZE = 2
# Ratio of a bottleneck's channels to those of its inner convolutions.
SQUEEZE = 4


@dataclass(frozen=True, slots=True)
class Layers:
    """Layer types: `lift` convolves the image and `conv` feature maps, from in_channels, channels and kernel_size.

    A field has `copies` channels: 1, or the order of the group if equivariant.
    """

    lift: Callable[[int, int, int], nn.Module]
    conv: Callable[[int, int, int], nn.Module]
    norm: Callable[[int], nn.BatchNorm2d]
    copies: int


CONV = partial(nn.Conv2d, padding="same", bias=False)
LAYERS = {
    "none": Layers(CONV, CONV, nn.BatchNorm2d, 1),
    "d4": Layers(partial(GroupConv2d, lifts=True), GroupConv2d, GroupNorm2d, ORDER),
}


class MeanMaxPool(nn.Module):
    """Concatenate mean and maximum over positions and the `copies` of a field, which are invariant under the symmetries.

    Shape: (n, channels, h, w) to (n, 2 channels / copies).
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        """Pool feature maps `x`."""
        fields = x.unflatten(1, (self.copies, -1))
        return torch.cat([fields.mean((1, 3, 4)), fields.amax((1, 3, 4))], dim=1)


class Plain(nn.Sequential):
    """3x3 convolution, batch norm, ReLU, max pooling: (n, in_channels, h, w) to (n, channels, h / 2, w / 2), rounded down."""

    stem_pools_first = False

    def __init__(self, in_channels: int, channels: int, layers: Layers) -> None:
        conv1, bn1 = layers.conv(in_channels, channels, 3), layers.norm(channels)
        super().__init__(OrderedDict(conv1=conv1, bn1=bn1, act1=nn.ReLU(inplace=True), pool=nn.MaxPool2d(POOL_SIZE)))


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: scale each field by a gate computed from the means of all fields (Hu et al. 2018, eq. 2 to 4)."""

    def __init__(self, channels: int, copies: int) -> None:
        super().__init__()
        self.copies = copies
        fields = channels // copies
        inner = max(1, fields // 4)
        self.gate = nn.Sequential(nn.Linear(fields, inner), nn.ReLU(inplace=True), nn.Linear(inner, fields), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Scale feature maps `x`."""
        means = x.unflatten(1, (self.copies, -1)).mean((1, 3, 4))
        return x * self.gate(means).repeat(1, self.copies)[:, :, None, None]


class Bottleneck(nn.Module):
    """Bottleneck: 1x1 → 3x3 → 1x1 convolution with a shortcut (He et al. 2016, figure 5, right).

    The inner convolutions have a quarter of the channels. Max pooling comes before the last convolution and at the start of
    the shortcut, where it halves the operations. The scale of the last norm starts at zero, so that the block starts as its
    shortcut (Goyal et al. 2017, section 5.1).

    Shape: (n, in_channels, h, w) to (n, channels, h / 2, w / 2), rounded down.
    """

    # A third faster on a CPU.
    stem_pools_first = True

    def __init__(self, in_channels: int, channels: int, layers: Layers) -> None:
        super().__init__()
        inner = channels // SQUEEZE
        self.conv1 = layers.conv(in_channels, inner, 1)
        self.bn1 = layers.norm(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = layers.conv(inner, inner, 3)
        self.bn2 = layers.norm(inner)
        self.act2 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(POOL_SIZE)
        self.conv3 = layers.conv(inner, channels, 1)
        self.bn3 = layers.norm(channels)
        self.excite = SqueezeExcite(channels, layers.copies)
        self.act3 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(layers.conv(in_channels, channels, 1), layers.norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the body to feature maps `x`."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.excite(self.bn3(self.conv3(self.pool(out))))
        return self.act3(out + self.shortcut(self.pool(x)))


BODIES: dict[str, type[Plain] | type[Bottleneck]] = {"plain": Plain, "bottleneck": Bottleneck}
