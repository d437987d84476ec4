"""The convolutional net, written out: a stem, blocks that double the filters and halve the side, and a sized head."""

import torch
from torch import Tensor, nn

from pcam_kaggle.errors import UserError

# Mean and standard deviation of R, G and B over the competition's train patches, to two digits.
IMAGE_MEAN = (0.70, 0.54, 0.70)
IMAGE_STD = (0.24, 0.28, 0.22)
POOL_SIZE = 2


def conv_output_shape(
    shape: tuple[int, int],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> tuple[int, int]:
    """Return the (height, width) that a convolution or a pooling leaves of `shape`, in pixels.

    Per axis: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1 (Dumoulin & Visin 2016, relationship 15).

    Raises ValueError where nothing is left: the dilated kernel is larger than the padded input.
    """

    def per_axis(value: int | tuple[int, int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else value

    left = []
    for size, k, s, p, d in zip(
        shape, per_axis(kernel_size), per_axis(stride), per_axis(padding), per_axis(dilation), strict=True
    ):
        span = size + 2 * p - d * (k - 1) - 1
        if span < 0:
            raise ValueError(f"a kernel of {k} with dilation {d} does not fit into {size} px padded by {p}")
        left.append(span // s + 1)
    return left[0], left[1]


def most_blocks(side: int) -> int:
    """Return how many blocks fit a square of `side` pixels: the stem and each block halve it, and 1 px must be left."""
    return max(0, side.bit_length() - 2)


class Normalize(nn.Module):
    """Shift and scale RGB in [0, 1] to about zero mean and unit variance; shape (n, 3, h, w) in and out."""

    def __init__(self, mean: tuple[float, ...] = IMAGE_MEAN, std: tuple[float, ...] = IMAGE_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Plain(nn.Module):
    """One 3x3 convolution, batch norm, ReLU: shape (n, in_channels, h, w) to (n, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(x)))


class Bottleneck(nn.Module):
    """1x1 → 3x3 → 1x1 with a shortcut (He et al. 2016, figure 5, right); a quarter of the filters inside.

    Shape (n, in_channels, h, w) to (n, channels, h, w). The last norm starts at zero, the block as its shortcut (Goyal et
    al. 2017, section 5.1).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.act3 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.act3(out + self.shortcut(x))


class MeanMaxPool(nn.Module):
    """Mean and maximum over all positions, side by side: shape (n, channels, h, w) to (n, 2 channels).

    The maximum answers whether there is tumour anywhere, the mean how much.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


BODIES = {"plain": Plain, "bottleneck": Bottleneck}


class BottleneckCNN(nn.Module):
    """Stem, blocks, head: RGB (n, 3, side, side) in [0, 1] to one logit each, shape (n,).

    The stem and every block halve the side by max pooling; block i has min(width 2^i, max_width) filters in `depth`
    bodies. The head flattens or pools what is left and has one hidden layer, dropout before each linear one.

    Raises UserError where the side is too small for `n_blocks`.
    """

    def __init__(
        self,
        n_blocks: int,
        width: int = 32,
        *,
        side: int = 96,
        body: str = "bottleneck",
        depth: int = 1,
        max_width: int = 512,
        pool_first: bool = False,
        head: str = "pool",
        hidden: int = 128,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if n_blocks > most_blocks(side):
            raise UserError(f"n_blocks={n_blocks}: too many for a side of {side} px, at most {most_blocks(side)} fit")
        make = BODIES[body]
        shape = (side, side)

        conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        norm, act, pool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(POOL_SIZE)
        self.normalize = Normalize()
        self.stem = nn.Sequential(conv, pool, norm, act) if pool_first else nn.Sequential(conv, norm, act, pool)
        shape = conv_output_shape(shape, 3, padding=1)
        shape = conv_output_shape(shape, POOL_SIZE, stride=POOL_SIZE)

        self.blocks = nn.Sequential()
        channels = width
        for _ in range(n_blocks):
            wider = min(2 * channels, max_width)
            bodies = [make(channels, wider), *(make(wider, wider) for _ in range(depth - 1))]
            self.blocks.append(nn.Sequential(*bodies, nn.MaxPool2d(POOL_SIZE)))
            shape = conv_output_shape(shape, 3, padding=1)
            shape = conv_output_shape(shape, POOL_SIZE, stride=POOL_SIZE)
            channels = wider

        features = 2 * channels if head == "pool" else channels * shape[0] * shape[1]
        self.head = nn.Sequential(
            MeanMaxPool() if head == "pool" else nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(features, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(self.normalize(x)))).squeeze(1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, Bottleneck):
        nn.init.zeros_(module.bn3.weight)
