"""Blocks of the CNN, ordinary or equivariant: layer types, pooling, and the two bodies of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pcam_kaggle.models.p4m import ORDER, GroupConv2d, GroupNorm2d, GroupPool

POOL_SIZE = 2
# Ratio of a bottleneck's channels to those of its inner convolutions.
SQUEEZE = 4


@dataclass(frozen=True, slots=True)
class Layers:
    """The layer types of a model.

    `lift` makes the convolution of the image and `conv` those of feature maps, from in_channels, channels and kernel_size. The
    global pooling gives two values per field. A field has `copies` channels: 1, or the order of the group if equivariant.
    """

    lift: Callable[[int, int, int], nn.Module]
    conv: Callable[[int, int, int], nn.Module]
    norm: Callable[[int], nn.BatchNorm2d]
    pool: Callable[[], nn.Module]
    copies: int


class MeanMaxPool(nn.Module):
    """Concatenate mean and maximum over all positions.

    Shape: (n, channels, h, w) to (n, 2 channels).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pool feature maps `x`."""
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


def _conv(in_channels: int, channels: int, kernel_size: int) -> nn.Module:
    return nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)


LAYERS = {
    "none": Layers(_conv, _conv, nn.BatchNorm2d, MeanMaxPool, 1),
    "d4": Layers(partial(GroupConv2d, lifts=True), GroupConv2d, GroupNorm2d, GroupPool, ORDER),
}


class Plain(nn.Module):
    """3x3 convolution, batch norm, ReLU, max pooling.

    Shape: (n, in_channels, h, w) to (n, channels, h / 2, w / 2), rounded down.
    """

    def __init__(self, in_channels: int, channels: int, layers: Layers) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 3)
        self.bn1 = layers.norm(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(POOL_SIZE)

    @staticmethod
    def stem(in_channels: int, channels: int, layers: Layers) -> nn.Sequential:
        """Return the same for an image."""
        return nn.Sequential(
            layers.lift(in_channels, channels, 3), layers.norm(channels), nn.ReLU(inplace=True), nn.MaxPool2d(POOL_SIZE)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the body to feature maps `x`."""
        return self.pool(self.act1(self.bn1(self.conv1(x))))


class SqueezeExcite(nn.Module):
    """Squeeze and excitation: scale each field by a gate computed from the means of all fields (Hu et al. 2018, eqs. 2 to 4).

    Shape: (n, channels, h, w), unchanged.
    """

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
    the shortcut, where it halves the operations. The result is gated before the shortcut is added. The scale of the last norm
    starts at zero, so that the block starts as its shortcut (Goyal et al. 2017, section 5.1).

    Shape: (n, in_channels, h, w) to (n, channels, h / 2, w / 2), rounded down.
    """

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

    @staticmethod
    def stem(in_channels: int, channels: int, layers: Layers) -> nn.Sequential:
        """Return convolution, max pooling, batch norm and ReLU of an image; pooling first makes it a third faster on a CPU."""
        return nn.Sequential(
            layers.lift(in_channels, channels, 3), nn.MaxPool2d(POOL_SIZE), layers.norm(channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the body to feature maps `x`."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.excite(self.bn3(self.conv3(self.pool(out))))
        return self.act3(out + self.shortcut(self.pool(x)))


BODIES: dict[str, type[Plain] | type[Bottleneck]] = {"plain": Plain, "bottleneck": Bottleneck}
