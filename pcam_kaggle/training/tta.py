"""Test-time augmentation (TTA) by symmetries, and the filter of fine colour detail."""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from pcam_kaggle.models.p4m import transform

# Standard deviations at which the Gaussian ends.
REACH = 3
# Where each view is shifted to, down and right.
CORNERS = (*((0, 0), (0, 1), (1, 1), (1, 0)), *((1, 1), (1, 0), (0, 0), (0, 1)))


def blur_chroma(images: Tensor, sigma: float) -> Tensor:
    """Return RGB `images` (n, 3, h, w) in [0, 1] with colour differences blurred by a Gaussian, and luma (ITU-R BT.601) kept.

    Fine colour detail tells a model which slide a patch is from; without it in prediction, models that are not equivariant
    score higher on held-out slides. `sigma` is the standard deviation in pixels; 0 changes nothing. Pixels are mirrored at the
    border; colours outside [0, 1] are clipped, which changes their luma.
    """
    if not sigma:
        return images
    reach = math.ceil(REACH * sigma)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (weights / weights.sum()).expand(3, 1, 1, -1)
    # bf16 and fp16 would round colours.
    with torch.autocast(images.device.type, enabled=False):
        padded = pad(images, (reach,) * 4, mode="reflect")
        blurred = conv2d(conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
        # A Gaussian is linear: blurring all of R, G, B and restoring the luma blurs the colour differences alone.
        red, green, blue = (images - blurred).split(1, dim=1)
        return (blurred + (0.299 * red + 0.587 * green + 0.114 * blue)).clamp(0, 1)


def views(images: Tensor, count: int, shift: int) -> list[Tensor]:
    """Return `count` (1, 4 or 8) views of `images` (n, channels, side, side), each of the same shape.

    A single view is the images themselves; four are the rotations by quarter turns; eight add the rotations of the mirror
    image. Each is shifted by `shift` px along each axis towards another corner, because pooling makes a model sensitive to the
    position; the mirror image of a rotation towards the opposite one. Pixels outside are mirrored.
    """
    if count == 1:
        return [images]
    side = images.shape[-1]
    padded = pad(images, (shift,) * 4, mode="reflect")
    made = []
    for symmetry, (down, right) in enumerate(CORNERS[:count]):
        moved = padded[..., 2 * shift * down :, 2 * shift * right :][..., :side, :side]
        # In the memory format of the images, which a rotation changes.
        made.append(torch.empty_like(images).copy_(transform(moved, symmetry)))
    return made
