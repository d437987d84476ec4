"""The CNN: a stem, blocks that double the filters and halve the side, and a head."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.blocks import BODIES, LAYERS, POOL_SIZE, Bottleneck

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

    `shape` is height and width in pixels, as is the result; the other arguments are one number for both axes or one per axis.

    Raises:
        ValueError: The dilated kernel is larger than the padded input.
    """
    per_axis = [(each, each) if isinstance(each, int) else each for each in (kernel_size, stride, padding, dilation)]
    sizes = []
    for size, k, s, p, d in zip(shape, *per_axis, strict=True):
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
        # One pass over the images instead of two.
        return torch.addcmul(-self.mean / self.std, x, 1 / self.std)


class BottleneckCNN(nn.Module):
    """Stem, blocks that double the channels and halve the side, pooling, and fully connected layers.

    Block i (from 1) has min(width 2^i, max_width) channels. With `head` pool the features are mean and maximum over positions,
    with flatten all positions. The head has one hidden layer and dropout before each linear layer. With `symmetry` d4 the
    logit is invariant under the eight symmetries of the square. See `Config` for the other arguments.

    Shape: RGB (n, 3, side, side) in [0, 1] to logits (n,).

    Raises:
        UserError: The side is too small for `n_blocks`.
    """

    def __init__(
        self,
        n_blocks: int,
        width: int = 32,
        *,
        side: int = 96,
        body: str = "bottleneck",
        symmetry: str = "none",
        max_width: int = 512,
        head: str = "pool",
        hidden: int = 128,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if n_blocks > most_blocks(side):
            raise UserError(f"n_blocks={n_blocks}: too many for a side of {side} px, at most {most_blocks(side)} fit")
        layers, create_body = LAYERS[symmetry], BODIES[body]
        channels = [min(width * 2**i, max_width) for i in range(n_blocks + 1)]
        self.normalize = Normalize()
        self.stem = create_body.stem(3, width, layers)
        self.blocks = nn.Sequential(*(create_body(*pair, layers) for pair in pairwise(channels)))
        shape = (side, side)
        for _ in channels:
            shape = conv_output_shape(shape, 3, padding=1)
            shape = conv_output_shape(shape, POOL_SIZE, stride=POOL_SIZE)
        self.pool = layers.pool() if head == "pool" else nn.Flatten()
        features = 2 * channels[-1] // layers.copies if head == "pool" else channels[-1] * shape[0] * shape[1]
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(features, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images `x`."""
        features = self.pool(self.blocks(self.stem(self.normalize(x))))
        # With the 8 bits of bf16, about a hundred patches would share each logit.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float()).squeeze(1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, Bottleneck):
        nn.init.zeros_(module.bn3.weight)
