"""Patches that look alike: a perceptual hash, and pairs that are close by it."""

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

BITS = 64
BANDS = 4
# Two hashes within as many bits as there are bands less one share a band.
NEAR = BANDS - 1


def looks(patches: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the difference hash of each of `patches`, RGB uint8 (n, 96, 96, 3): where 8x8 cells are brighter than their left.

    Shape (n,). A copy that was compressed, blurred or stained anew keeps nearly all of its bits.
    """
    count, height, width = patches.shape[:3]
    gray = cv2.cvtColor(patches.reshape(count * height, width, 3), cv2.COLOR_RGB2GRAY)
    # The means of 8x9 cells as whole greys, first down, then across: half the time of cv2.resize, which takes both at once. In
    # thirds of a pixel all sums are whole numbers, so they do not depend on the order of adding.
    down = gray.reshape(count, 8, height // 8, width).sum(2, dtype=np.uint16)
    thirds = np.rint(width / 3 * cv2.resize(np.eye(width, dtype=np.float32), (9, width), interpolation=cv2.INTER_AREA))
    cells = np.rint(down @ thirds / (width / 3 * height / 8))
    brighter = (cells[:, :, 1:] > cells[:, :, :-1]).reshape(count, BITS)
    return np.packbits(brighter, axis=1).view(">u8")[:, 0].astype(np.uint64)


def near_pairs(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return which of `hashes` (n,) are within 3 bits of one another: (pairs, 3), the first's place, the second's, the bits.

    Each pair stands once, the lower place first. Only those are compared that share one of four bands of 16 bits, and of three
    bits that differ one band at least has none.
    """
    width = BITS // BANDS
    found = [np.empty((0, 3), np.int64)]
    for band in range(BANDS):
        keys = (hashes >> np.uint64(width * band)) & np.uint64(2**width - 1)
        order = np.argsort(keys, kind="stable")
        keys, step = keys[order], 1
        here = np.flatnonzero(keys[1:] == keys[:-1])
        while len(here):
            first, second = order[here], order[here + step]
            bits = np.bitwise_count(hashes[first] ^ hashes[second]).astype(np.int64)
            near = bits <= NEAR
            found.append(np.stack([first[near], second[near], bits[near]], axis=1))
            step += 1
            here = here[here + step < len(keys)]
            here = here[keys[here + step] == keys[here]]
    return np.unique(np.concatenate(found), axis=0)


def nearest_elsewhere(hashes: NDArray[np.uint64], folds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of `hashes` (n,) the nearest within 3 bits that lies in another of `folds` (n,), where there is one.

    (found, 3): its place, the other's place, the bits; the lowest places of equally near ones. As many that look the same as
    there are, blank patches for one, cost no more than others.
    """
    kinds, kind = np.unique(hashes, return_inverse=True)
    near, same = near_pairs(kinds), np.arange(len(kinds))
    links = np.concatenate([near, near[:, [1, 0, 2]], np.stack([same, same, 0 * same], axis=1)])
    members = pd.DataFrame({"kind": kind, "place": np.arange(len(hashes)), "fold": folds})
    # Of two in two folds, one at least is in another fold than any third: more than two of a kind need not be looked at.
    faces = members.drop_duplicates(["kind", "fold"]).groupby("kind").head(2)
    others = pd.DataFrame(links, columns=["kind", "other", "bits"]).merge(faces.rename(columns={"kind": "other"}), on="other")
    others = others.sort_values(["kind", "bits", "place"]).drop_duplicates(["kind", "fold"]).groupby("kind").head(2)
    pairs = members.merge(others, on="kind", suffixes=("", "_other"))
    pairs = pairs[pairs["fold"] != pairs["fold_other"]].sort_values(["place", "bits", "place_other"]).drop_duplicates("place")
    return pairs[["place", "place_other", "bits"]].to_numpy(np.int64)
