"""Near-duplicates: found after common changes of their pixels, listed once, and counted if they are in two folds."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import Outcome, write_tif

from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import draw_patch
from pcam_kaggle.data.near_duplicates import MAX_BITS, near_duplicates, near_pairs, nearest_in_other_folds, perceptual_hashes
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels


def some_patch(seed: int) -> np.ndarray:
    """Return a synthetic patch."""
    return draw_patch(np.random.default_rng(seed), np.random.default_rng(0), None)[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: cv2.imdecode(cv2.imencode(".jpg", patch, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], cv2.IMREAD_COLOR),
        lambda patch: np.clip(patch.astype(int) + 6, 0, 255).astype(np.uint8),
        lambda patch: patch,
    ],
    ids=["jpeg", "brighter", "copy"],
)
def test_a_changed_copy_is_near_and_another_patch_is_not(change: Callable[[np.ndarray], np.ndarray]) -> None:
    patches = [some_patch(seed) for seed in range(20)]
    hashes = perceptual_hashes(np.stack([*patches, *map(change, patches)]))
    assert {tuple(pair) for pair in near_pairs(hashes)[:, :2]} == {(number, number + 20) for number in range(20)}


def test_a_hash_does_not_depend_on_the_other_patches() -> None:
    patches = np.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), np.uint8)
    assert perceptual_hashes(patches).tolist() == [int(perceptual_hashes(patch[None])[0]) for patch in patches]


def test_every_near_pair_is_found_once() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    for number in range(0, 300, 3):
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            hashes[number + 1] = hashes[number] ^ (np.uint64(1) << np.uint64(bit)) if bit % 2 else hashes[number]
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None]).astype(int)
    expected = {(i, j, bits[i, j]) for i in range(300) for j in range(i + 1, 300) if bits[i, j] <= MAX_BITS}
    found = near_pairs(hashes)
    assert {tuple(map(int, pair)) for pair in found} == {tuple(map(int, pair)) for pair in expected}
    assert len(found) == len(expected) > 50


def test_the_nearest_of_another_fold_is_found() -> None:
    rng = np.random.default_rng(1)
    bits_set = np.uint64(1) << rng.integers(0, 64, (400, 2)).astype(np.uint64)
    hashes = rng.integers(0, 2**63, 20, dtype=np.uint64)[rng.integers(0, 20, 400)] ^ bits_set[:, 0] ^ bits_set[:, 1]
    hashes[:100] = hashes[0]
    folds = rng.integers(0, 3, 400)
    folds[:90] = 0
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None]).astype(int)
    bits[folds[:, None] == folds[None]] = 64
    nearest = bits.argmin(axis=1)
    expected = [(place, other, bits[place, other]) for place, other in enumerate(nearest) if bits[place, other] <= MAX_BITS]
    assert [tuple(map(int, row)) for row in nearest_in_other_folds(hashes, folds)] == [tuple(map(int, row)) for row in expected]
    assert 200 < len(expected) < 400


@pytest.mark.parametrize("changed", [False, True])
def test_near_duplicates_of_two_folds_are_listed(changed: bool, data: Data, tmp_path: Path) -> None:
    labels = pd.read_csv(data.labels)
    first = labels["id"][0]
    patch = cv2.cvtColor(cv2.imread(str(data.patches("train") / f"{first}.tif")), cv2.COLOR_BGR2RGB)
    patch[5, 5] ^= changed
    write_tif(data.patches("train") / "twin.tif", patch)
    pd.concat([labels, pd.DataFrame({"id": ["twin"], "label": [0]})]).to_csv(data.labels, index=False)
    prepare(data, tmp_path / "store", ids="names")
    store, table = PatchStore(tmp_path / "store"), read_labels(data.labels).assign(fold=0)
    assert near_duplicates(store, table).empty
    listed = near_duplicates(store, table.assign(fold=(table["id"] == "twin").astype(int)))
    assert listed[["id", "fold", "other_id", "other_fold", "copy"]].to_numpy().tolist() == [
        [first, 0, "twin", 1, not changed],
        ["twin", 1, first, 0, not changed],
    ]


def test_their_number_is_printed_once(pcam: Callable[..., Outcome]) -> None:
    pcam("prepare")
    assert "folds: 0 of 36 patches are near-duplicates of one in another fold, 0 are copies" in pcam("folds").out
    assert "near-duplicate" not in pcam("folds").out


def test_the_list_is_written_as_soon_as_there_are_patches(pcam: Callable[..., Outcome], tmp_path: Path) -> None:
    listed = tmp_path / "work" / "folds" / "stratified_3_42_near_duplicates.csv"
    for stages, exists in ((["folds"], False), (["prepare", "folds"], True)):
        for stage in stages:
            assert pcam(stage).status == 0
        assert listed.exists() == exists
