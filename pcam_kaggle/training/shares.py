"""Which GPU trains which epochs of which fold."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive epochs of a fold.

    Attributes:
        fold: Number of the fold.
        start: Epochs that are finished before.
        until: Epochs that are finished after.
        is_shared: Whether another GPU trains the other epochs.
    """

    fold: int
    start: int
    until: int
    is_shared: bool = False


def balanced(done: dict[int, int], epochs: int, gpus: int) -> list[list[Stretch]]:
    """Distribute folds over GPUs so that all end at about the same time.

    McNaughton's rule (1959, theorem 3.1): one GPU is filled after the other, up to the mean of the epochs per GPU. The fold
    that exceeds this limit ends there and begins on the next GPU, as the first that it trains. Its two parts do not overlap.

    Args:
        done: Finished epochs of each fold.
        epochs: Epochs of a fold.
        gpus: Number of GPUs, at least 1.

    Returns:
        What each GPU trains, in this order; a GPU without work is left out.
    """
    left = {fold: epochs - finished for fold, finished in done.items()}
    limit = max(math.ceil(sum(left.values()) / gpus), *left.values())
    shares: list[list[Stretch]] = [[]]
    used = 0
    for fold, count in left.items():
        fitting = min(count, limit - used)
        middle = epochs - fitting
        is_split = 0 < fitting < count
        if fitting or not count:
            shares[-1].append(Stretch(fold, middle, epochs, is_split))
            used += fitting
        if fitting < count:
            shares.append([Stretch(fold, done[fold], middle, is_split)])
            used = count - fitting
    return shares
