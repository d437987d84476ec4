"""Test-time augmentation (TTA) by the symmetries of the square."""

import torch
from torch import Tensor


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
