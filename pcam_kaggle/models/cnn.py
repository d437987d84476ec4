"""The CNN: a stem, blocks that double the filters and halve the side, and a head."""

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
    """Return the output shape of a convolution or a pooling layer.

    Per axis: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1 (Dumoulin & Visin 2016, relationship 15).

    Args:
        shape: Height and width of the input in pixels.
        kernel_size: Side of the kernel, or one value per axis, as all of the following.
        stride: Step of the kernel in pixels.
        padding: Pixels added on each side of the input.
        dilation: Distance of the kernel's elements in pixels.

    Returns:
        Height and width of the output in pixels.

    Raises:
        ValueError: The dilated kernel is larger than the padded input.
    """

    def per_axis(value: int | tuple[int, int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else value

    sizes = []
    for size, k, s, p, d in zip(
        shape, per_axis(kernel_size), per_axis(stride), per_axis(padding), per_axis(dilation), strict=True
    ):
        span = size + 2 * p - d * (k - 1) - 1
        if span < 0:
            raise ValueError(f"a kernel of {k} with dilation {d} does not fit into {size} px padded by {p}")
        sizes.append(span // s + 1)
    return sizes[0], sizes[1]


def most_blocks(side: int) -> int:
    """Return the largest number of blocks for an input of `side` px: the stem and each block halve it, and 1 px must remain."""
    return max(0, side.bit_length() - 2)


class Normalize(nn.Module):
    """Normalise RGB in [0, 1] to about zero mean and unit variance.

    Shape: (n, 3, h, w), unchanged.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = IMAGE_MEAN, std: tuple[float, ...] = IMAGE_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images `x`."""
        return (x - self.mean) / self.std


class Stream(nn.Module):
    """Stem, blocks and pooling on the central square of `side` px.

    The stem and every block halve the side by max pooling, at the end of a block or, with `pool_inside`, in its first body.
    Block i (from 1) has min(width 2^i, max_width) filters in `depth` bodies. The output is pooled over positions or, with
    `head` flatten, contains all positions. See `Config` for the arguments.

    Shape: normalised images (n, 3, h, w) to vectors (n, features).

    Attributes:
        side: Side of the square in pixels.
        features: Length of the output vector.

    Raises:
        UserError: The side is too small for `n_blocks`.
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
        create_body = Plain if body == "plain" else partial(Bottleneck, squeeze=squeeze, excite=excite)
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
            out_channels = min(2 * channels, max_width)
            bodies = [
                create_body(channels, out_channels, pool_inside, layers),
                *(create_body(out_channels, out_channels, False, layers) for _ in range(depth - 1)),
            ]
            self.blocks.append(nn.Sequential(*bodies, *([] if pool_inside else [nn.MaxPool2d(POOL_SIZE)])))
            shape = conv_output_shape(shape, 3, padding=1)
            shape = conv_output_shape(shape, POOL_SIZE, stride=POOL_SIZE)
            channels = out_channels
        self.pool = layers.pool() if head == "pool" else nn.Flatten()
        self.features = 2 * channels // layers.copies if head == "pool" else channels * shape[0] * shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature vectors of normalised images `x`."""
        top, left = (x.shape[2] - self.side) // 2, (x.shape[3] - self.side) // 2
        return self.pool(self.blocks(self.stem(x[:, :, top : top + self.side, left : left + self.side])))


class BottleneckCNN(nn.Module):
    """One or two streams and a head.

    With `centre` a second stream, with one block less, reads the central square of that side, which alone decides the label.
    The head has one hidden layer and dropout before each linear layer. With `symmetry` d4 the logit is invariant under the
    eight symmetries of the square. See `Config` for the other arguments.

    Shape: RGB (n, 3, side, side) in [0, 1] to logits (n,).

    Raises:
        UserError: A side is too small for its blocks.
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
        # The whole patch comes last: Grad-CAM reads the last feature map of a net.
        sides = ({centre: n_blocks - 1} if centre else {}) | {side: n_blocks}
        streams = [
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
        ]
        self.streams = nn.ModuleList(streams)
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(sum(stream.features for stream in streams), hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images `x`."""
        x = self.normalize(x)
        features = torch.cat([stream(x) for stream in self.streams], dim=1)
        # With the 8 bits of bf16, about a hundred patches would share each logit.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float()).squeeze(1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, Bottleneck):
        nn.init.zeros_(module.bn3.weight)
