"""Near-duplicate patches: a perceptual hash, pairs with similar hashes, and their list over folds."""

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.files import sha256
from pcam_kaggle.data.store import PatchStore

BITS = 64
BANDS = 4
# Two hashes that differ in fewer bits than there are bands have at least one band in common.
MAX_BITS = BANDS - 1


def perceptual_hashes(patches: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the difference hash of each patch: which cells of an 8x9 grid are brighter than their left neighbour.

    A copy that was compressed, blurred or restained keeps nearly all bits.

    Args:
        patches: RGB uint8 (n, 96, 96, 3).

    Returns:
        uint64 (n,), the first cell in the highest bit.
    """
    count, height, width = patches.shape[:3]
    gray = cv2.cvtColor(patches.reshape(count * height, width, 3), cv2.COLOR_RGB2GRAY)
    # The means of 8x9 cells, rounded to whole grey levels, first over rows, then over columns: half the time of cv2.resize,
    # which does both at once. In thirds of a pixel all sums are integers, so they do not depend on the order of addition.
    rows = gray.reshape(count, 8, height // 8, width).sum(2, dtype=np.uint16)
    thirds = np.rint(width / 3 * cv2.resize(np.eye(width, dtype=np.float32), (9, width), interpolation=cv2.INTER_AREA))
    cells = np.rint(rows @ thirds / (width / 3 * height / 8))
    brighter = (cells[:, :, 1:] > cells[:, :, :-1]).reshape(count, BITS)
    return np.packbits(brighter, axis=1).view(">u8")[:, 0].astype(np.uint64)


def near_pairs(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return all pairs of `hashes` that differ in at most 3 bits.

    Only hashes that share one of four bands of 16 bits are compared: three different bits leave at least one band equal.

    Args:
        hashes: uint64 (n,).

    Returns:
        int64 (pairs, 3): position of the first, of the second, number of different bits. Each pair is listed once, with the
        lower position first.
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
            near = bits <= MAX_BITS
            found.append(np.stack([first[near], second[near], bits[near]], axis=1))
            step += 1
            here = here[here + step < len(keys)]
            here = here[keys[here + step] == keys[here]]
    return np.unique(np.concatenate(found), axis=0)


def nearest_in_other_folds(hashes: NDArray[np.uint64], folds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the nearest hash of another fold for each hash that has one within 3 bits.

    Many equal hashes, such as those of blank patches, cost no more than different ones.

    Args:
        hashes: uint64 (n,).
        folds: Fold of each hash, int64 (n,).

    Returns:
        int64 (found, 3): position of the hash, of its nearest, number of different bits. Among equally near hashes the one with
        the lowest position is taken.
    """
    distinct, kind = np.unique(hashes, return_inverse=True)
    near, same = near_pairs(distinct), np.arange(len(distinct))
    links = np.concatenate([near, near[:, [1, 0, 2]], np.stack([same, same, 0 * same], axis=1)])
    members = pd.DataFrame({"kind": kind, "place": np.arange(len(hashes)), "fold": folds})
    # Of two hashes in two folds at least one is in another fold than any third: two of a kind are enough.
    candidates = members.drop_duplicates(["kind", "fold"]).groupby("kind").head(2)
    others = pd.DataFrame(links, columns=["kind", "other", "bits"]).merge(
        candidates.rename(columns={"kind": "other"}), on="other"
    )
    others = others.sort_values(["kind", "bits", "place"]).drop_duplicates(["kind", "fold"]).groupby("kind").head(2)
    pairs = members.merge(others, on="kind", suffixes=("", "_other"))
    pairs = pairs[pairs["fold"] != pairs["fold_other"]].sort_values(["place", "bits", "place_other"]).drop_duplicates("place")
    return pairs[["place", "place_other", "bits"]].to_numpy(np.int64)


def near_duplicates(store: PatchStore, table: pd.DataFrame) -> pd.DataFrame:
    """Return the train patches that have a near-duplicate in another fold.

    Args:
        store: The patches; those that it skipped are left out.
        table: Folds, columns id, label and fold.

    Returns:
        Columns id, fold and label, the same of the nearest patch of another fold (other_id, other_fold, other_label), `bits` of
        the 64-bit perceptual hash that differ (at most 3), and `copy`, whether a patch of another fold has the same pixels.
    """
    table = table[table["id"].isin(store.ids("train"))].reset_index(drop=True)
    rows = store.rows("train", table["id"].to_numpy())
    nearest = nearest_in_other_folds(store.perceptual_hashes(rows), table["fold"].to_numpy())
    first, second = (table.iloc[nearest[:, side]][["id", "fold", "label"]].reset_index(drop=True) for side in (0, 1))
    listed = first.join(second.add_prefix("other_")).assign(bits=nearest[:, 2])
    pixels = pd.Series([sha256(store.images(rows[place : place + 1]).tobytes()) for place in nearest[:, 0]], dtype=str)
    return listed.assign(copy=listed.groupby(pixels)["fold"].transform("nunique") > 1)
