"""The project's CNN for prediction: batch norms folded into the convolutions before them, pooling without indices."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pcam_kaggle.models.blocks import POOL_SIZE
from pcam_kaggle.models.cnn import BottleneckCNN
from pcam_kaggle.models.p4m import GroupConv2d


def fold_norms(net: nn.Module) -> nn.Module:
    """Set `net` to evaluation mode and return a copy that computes the same with fewer passes over its feature maps.

    Each batch norm that follows a convolution is folded into it (Jacob et al. 2018, section 3.2), and group convolutions become
    ordinary ones. The batch norm of a stem that pools first stays. Pooling does not compute the positions of the maxima, which
    only a backward pass needs. A model of timm is returned unchanged.
    """
    net.eval()
    if not isinstance(net, BottleneckCNN):
        return net
    folded = copy.deepcopy(net)
    for parent in list(folded.modules()):
        # The blocks define their layers in the order in which they apply them.
        for (name, layer), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(layer, nn.Conv2d | GroupConv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, _fold(layer, norm))
                setattr(parent, norm_name, nn.Identity())
        for name, layer in parent.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, MaxPool())
    return folded


class MaxPool(nn.Module):
    """Maximum over squares of 2 px: (n, channels, h, w) to (n, channels, h / 2, w / 2), rounded down."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool feature maps `x`."""
        height, width = (side // POOL_SIZE * POOL_SIZE for side in x.shape[2:])
        rows = torch.maximum(x[..., 0:height:2, :], x[..., 1:height:2, :])
        return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def _fold(layer: nn.Conv2d | GroupConv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    filters = layer.filters() if isinstance(layer, GroupConv2d) else layer.weight
    channels, in_channels, side, _ = filters.shape
    # One mean, variance, scale and shift serves the copies of a field.
    copies = channels // norm.num_features
    mean, variance, scale, shift = (
        getattr(norm, name).repeat(copies) for name in ("running_mean", "running_var", "weight", "bias")
    )
    conv = nn.Conv2d(in_channels, channels, side, padding=side // 2, device=filters.device).eval()
    conv.weight, conv.bias = fuse_conv_bn_weights(filters, None, mean, variance, norm.eps, scale, shift)
    return conv
