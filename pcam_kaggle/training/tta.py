"""The views of test-time augmentation: the symmetries of the square."""

import torch
from torch import Tensor


def views(images: Tensor, count: int) -> list[Tensor]:
    """Return `count` (1, 4 or 8) views of `images` (n, channels, side, side), the images themselves first.

    Four views are the rotations by quarter turns; eight add the rotations of the mirror image. The tumour rule, any
    tumour pixel in the centre square, holds for a view as for the patch.
    """
    turns = {1: 1, 4: 4, 8: 4}[count]
    faces = [images, images.flip(3)] if count == 8 else [images]
    return [torch.rot90(face, turn, (2, 3)) for face in faces for turn in range(turns)]


def average(logits: Tensor, mean: str) -> Tensor:
    """Return probabilities (n,), float64, from `logits` (views, n): the mean of `logits` or of `probabilities`."""
    logits = logits.double()
    return logits.mean(0).sigmoid() if mean == "logits" else logits.sigmoid().mean(0)
