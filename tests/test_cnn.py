"""The net: shapes against torch, the description to the letter, the most blocks."""

import itertools

import pytest
import torch
from torch import nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import EXPERIMENTS
from pcam_kaggle.models.blocks import MeanMaxPool
from pcam_kaggle.models.cnn import BottleneckCNN, conv_output_shape
from pcam_kaggle.models.factory import create

Pair = int | tuple[int, int]
GRID = [*itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2, 3)), ((3, 5), (2, 1), (0, 2), (1, 2))]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GRID)
def test_conv_output_shape_is_torchs(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    for shape in ((96, 96), (7, 13), (11, 5), (1, 2)):
        conv = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
        try:
            expected = tuple(conv(torch.zeros(1, 1, *shape)).shape[2:])
        except RuntimeError:
            with pytest.raises(ValueError, match="does not fit"):
                conv_output_shape(shape, kernel, stride, padding, dilation)
        else:
            assert conv_output_shape(shape, kernel, stride, padding, dilation) == expected


@pytest.mark.parametrize("side", range(32, 97, 2))
def test_most_blocks_fit_and_one_more_does_not(side: int) -> None:
    most = side.bit_length() - 2
    config = Config(width=4, max_width=8, side=side, n_blocks=1, head="flatten", hidden=2)
    net = BottleneckCNN(most, 4, config).eval()
    assert net(torch.rand(2, 3, side, side)).shape == (2,)
    with pytest.raises(UserError, match=f"at most {most} fit"):
        BottleneckCNN(most + 1, 4, config)


def test_plain_is_the_description() -> None:
    config = EXPERIMENTS["plain"].config
    net = create(config)
    layers = [m for m in net.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    names = [type(layer).__name__ for layer in layers[1:]]
    assert names[:20] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 5
    assert names[20:] == ["Flatten", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [32, 64, 128, 256, 512]
    assert {conv.kernel_size for conv in convs} == {(3, 3)}
    assert net.head[1].in_features == 512 * 3 * 3


def test_channels_double_up_to_the_widest_and_a_fresh_bottleneck_is_its_shortcut() -> None:
    blocks = BottleneckCNN(4, 8, Config(max_width=32)).train().blocks
    assert [block.conv3.out_channels for block in blocks] == [16, 32, 32, 32]
    x = torch.rand(4, 32, 6, 6)
    assert torch.equal(blocks[2](x), blocks[2].pool(x))


def test_pooling_is_mean_and_maximum_over_positions() -> None:
    x = torch.rand(2, 5, 6, 6)
    assert torch.equal(MeanMaxPool(1)(x), torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))
