"""The convolutional net, written out: a stem, blocks that double the filters and halve the side, and a sized head."""

from functools import partial

import torch
from torch import Tensor, nn

from pcam_kaggle import UserError
from pcam_kaggle.models.blocks import LAYERS, POOL_SIZE, Bottleneck, Layers, Plain

# Mean and standard deviation of R, G and B over the competition's train patches, to two digits.
IMAGE_MEAN = (0.70, 0.54, 0.70)
IMAGE_STD = (0.24, 0.28, 0.22)


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


class Stream(nn.Module):
    """Stem, blocks, pooling on the centre square of `side` px: images (n, 3, h, w) to vectors (n, `features`).

    The stem and every block halve the side by max pooling, at a block's end or inside of its first body; block i has
    min(width 2^i, max_width) filters in `depth` bodies. The end pools over positions or, with `head` flatten, keeps them all.

    Raises UserError where the side is too small for `n_blocks`.
    """

    def __init__(
        self,
        n_blocks: int,
        width: int,
        *,
        side: int,
        body: str,
        depth: int,
        max_width: int,
        squeeze: int,
        excite: bool,
        pool_first: bool,
        pool_inside: bool,
        head: str,
        layers: Layers,
    ) -> None:
        super().__init__()
        if n_blocks > most_blocks(side):
            raise UserError(f"n_blocks={n_blocks}: too many for a side of {side} px, at most {most_blocks(side)} fit")
        make = Plain if body == "plain" else partial(Bottleneck, squeeze=squeeze, excite=excite)
        self.side = side
        shape = (side, side)

        conv = layers.lift(3, width, 3)
        norm, act, pool = layers.norm(width), nn.ReLU(inplace=True), nn.MaxPool2d(POOL_SIZE)
        self.stem = nn.Sequential(conv, pool, norm, act) if pool_first else nn.Sequential(conv, norm, act, pool)
        shape = conv_output_shape(shape, 3, padding=1)
        shape = conv_output_shape(shape, POOL_SIZE, stride=POOL_SIZE)

        self.blocks = nn.Sequential()
        channels = width
        for _ in range(n_blocks):
            wider = min(2 * channels, max_width)
            bodies = [
                make(channels, wider, pool_inside, layers),
                *(make(wider, wider, False, layers) for _ in range(depth - 1)),
            ]
            self.blocks.append(nn.Sequential(*bodies, *([] if pool_inside else [nn.MaxPool2d(POOL_SIZE)])))
            shape = conv_output_shape(shape, 3, padding=1)
            shape = conv_output_shape(shape, POOL_SIZE, stride=POOL_SIZE)
            channels = wider
        self.end = layers.pool() if head == "pool" else nn.Flatten()
        self.features = 2 * channels // layers.copies if head == "pool" else channels * shape[0] * shape[1]

    def forward(self, x: Tensor) -> Tensor:
        top, left = (x.shape[2] - self.side) // 2, (x.shape[3] - self.side) // 2
        return self.end(self.blocks(self.stem(x[:, :, top : top + self.side, left : left + self.side])))


class BottleneckCNN(nn.Module):
    """One stream or two, and a head: RGB (n, 3, side, side) in [0, 1] to one logit each, shape (n,).

    With `centre` a second stream of one block less reads the centre square of that side, which alone decides the label,
    beside the context. The head has one hidden layer, dropout before each linear one. With `symmetry` d4 the logit is the
    same under the square's eight symmetries.

    Raises UserError where a side is too small for its blocks.
    """

    def __init__(
        self,
        n_blocks: int,
        width: int = 32,
        *,
        side: int = 96,
        centre: int = 0,
        body: str = "bottleneck",
        symmetry: str = "none",
        depth: int = 1,
        max_width: int = 512,
        squeeze: int = 4,
        excite: bool = False,
        pool_first: bool = False,
        pool_inside: bool = False,
        head: str = "pool",
        hidden: int = 128,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.normalize = Normalize()
        # The whole comes last: what a net looked at is asked of its last map.
        sides = ({centre: n_blocks - 1} if centre else {}) | {side: n_blocks}
        self.streams = nn.ModuleList(
            Stream(
                blocks,
                width,
                side=size,
                body=body,
                depth=depth,
                max_width=max_width,
                squeeze=squeeze,
                excite=excite,
                pool_first=pool_first,
                pool_inside=pool_inside,
                head=head,
                layers=LAYERS[symmetry],
            )
            for size, blocks in sides.items()
        )
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(sum(stream.features for stream in self.streams), hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        features = torch.cat([stream(x) for stream in self.streams], dim=1)
        # In 8 bits of bf16 a hundred patches would share each logit.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float()).squeeze(1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, Bottleneck):
        nn.init.zeros_(module.bn3.weight)
