"""The CNN: a stem, blocks that double the filters and halve the side, and a head."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.blocks import BODIES, LAYERS, POOL_SIZE, Bottleneck, MeanMaxPool

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
    """Return height and width in pixels of the output of a convolution or a pooling layer for an input of `shape`.

    Per axis: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1 (Dumoulin & Visin 2016, relationship 15). The
    other arguments are one number for both axes or one per axis. Raises ValueError if the dilated kernel is larger than the
    padded input.
    """
    per_axis = [(each, each) if isinstance(each, int) else each for each in (kernel_size, stride, padding, dilation)]
    sizes = []
    for size, k, s, p, d in zip(shape, *per_axis, strict=True):
        span = size + 2 * p - d * (k - 1) - 1
        if span < 0:
            raise ValueError(f"a kernel of {k} with dilation {d} does not fit into {size} px padded by {p}")
        sizes.append(span // s + 1)
    return sizes[0], sizes[1]


class Normalize(nn.Module):
    """Normalise RGB (n, 3, h, w) in [0, 1] to about zero mean and unit variance."""

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

    Block i (from 1) has min(width 2^i, max_width) channels. The head has a hidden layer, and dropout before each linear layer.
    `config` has the hyper-parameters besides `n_blocks` and `width`. With its `symmetry` d4 the logit is invariant under the
    eight symmetries of the square.

    Shape: RGB (n, 3, side, side) in [0, 1] to logits (n,). Raises UserError if the side is too small for `n_blocks`.
    """

    def __init__(self, n_blocks: int, width: int = 32, config: Config | None = None) -> None:
        super().__init__()
        config = config or Config()
        # The stem and each block halve the side, and 1 px must remain.
        side, most = config.side, config.side.bit_length() - 2
        if n_blocks > most:
            raise UserError(f"n_blocks={n_blocks}: too many for a side of {side} px, at most {most} fit")
        layers, create_body = LAYERS[config.symmetry], BODIES[config.body]
        channels = [min(width * 2**i, config.max_width) for i in range(n_blocks + 1)]
        self.normalize = Normalize()
        conv, norm, act, pool = layers.lift(3, width, 3), layers.norm(width), nn.ReLU(inplace=True), nn.MaxPool2d(POOL_SIZE)
        order = (conv, pool, norm, act) if create_body.stem_pools_first else (conv, norm, act, pool)
        self.stem = nn.Sequential(*order)
        self.blocks = nn.Sequential(*(create_body(*pair, layers) for pair in pairwise(channels)))
        shape = (side, side)
        for _ in channels:
            shape = conv_output_shape(shape, 3, padding=1)
            shape = conv_output_shape(shape, POOL_SIZE, stride=POOL_SIZE)
        is_pooled = config.head == "pool"
        self.pool = MeanMaxPool(layers.copies) if is_pooled else nn.Flatten()
        features = 2 * channels[-1] // layers.copies if is_pooled else channels[-1] * shape[0] * shape[1]
        rate, hidden = config.dropout, config.hidden
        self.head = nn.Sequential(
            nn.Dropout(rate), nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Dropout(rate), nn.Linear(hidden, 1)
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
