"""What happens to a patch at test time: fine colour detail is filtered, and symmetries augment it (TTA)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

# Standard deviations at which the Gaussian of the filter ends.
REACH = 3


def blur_chroma(images: Tensor, sigma: float) -> Tensor:
    """Return `images` with their colour differences blurred by a Gaussian, and their luma (ITU-R BT.601) kept.

    Fine colour detail tells a net which slide a patch is from. Ordinary nets read it in training; without it in prediction they
    score lower on slides that they know and higher on others. Equivariant nets gain nothing.

    Args:
        images: RGB (n, 3, h, w) in [0, 1].
        sigma: Standard deviation in pixels; 0 changes nothing. Pixels are mirrored at the border.

    Returns:
        Images of the same shape. A colour that does not exist is clipped to [0, 1], which changes its luma.
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
        luma = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
        # A Gaussian is linear: blurring all of R, G, B and restoring the luma blurs the colour differences alone.
        return (blurred + ((images - blurred) * luma).sum(1, keepdim=True)).clamp(0, 1)


def views(images: Tensor, count: int) -> list[Tensor]:
    """Return the views of a batch, the images themselves first.

    Four views are the rotations by quarter turns; eight add the rotations of the mirror image. All views have the label of
    the patch, since each maps the centre square to itself.

    Args:
        images: (n, channels, side, side).
        count: 1, 4 or 8.

    Returns:
        `count` tensors of the shape of `images`.
    """
    turns = {1: 1, 4: 4, 8: 4}[count]
    faces = [images, images.flip(3)] if count == 8 else [images]
    return [torch.rot90(face, turn, (2, 3)) for face in faces for turn in range(turns)]


def average(logits: Tensor, mean: str) -> Tensor:
    """Average the views of each patch.

    Args:
        logits: (views, n).
        mean: What is averaged, `logits` or `probabilities`.

    Returns:
        Probabilities, float64 (n,).
    """
    logits = logits.double()
    return logits.mean(0).sigmoid() if mean == "logits" else logits.sigmoid().mean(0)
