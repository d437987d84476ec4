"""Patches that look alike: a perceptual hash, and pairs that are close by it."""

import cv2
import numpy as np
from numpy.typing import NDArray

BITS = 64
BANDS = 4
# Two hashes within as many bits as there are bands less one share a band.
NEAR = BANDS - 1


def look(patch: NDArray[np.uint8]) -> int:
    """Return the difference hash of `patch`, RGB uint8 (h, w, 3), in [0, 2^64): where 8x8 cells are brighter than their left.

    A copy that was compressed, blurred or stained anew keeps nearly all of its bits.
    """
    cells = cv2.resize(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes())


def near_pairs(looks: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return which of `looks` (n,) are within 3 bits of one another: (pairs, 3), the first's place, the second's, the bits.

    Each pair stands once, the lower place first. Only those are compared that share one of four bands of 16 bits, and of three
    bits that differ one band at least has none.
    """
    width = BITS // BANDS
    found = [np.empty((0, 3), np.int64)]
    for band in range(BANDS):
        keys = (looks >> np.uint64(width * band)) & np.uint64(2**width - 1)
        order = np.argsort(keys, kind="stable")
        keys, step = keys[order], 1
        here = np.flatnonzero(keys[1:] == keys[:-1])
        while len(here):
            first, second = order[here], order[here + step]
            bits = np.bitwise_count(looks[first] ^ looks[second]).astype(np.int64)
            near = bits <= NEAR
            found.append(np.stack([first[near], second[near], bits[near]], axis=1))
            step += 1
            here = here[here + step < len(keys)]
            here = here[keys[here + step] == keys[here]]
    return np.unique(np.concatenate(found), axis=0)
