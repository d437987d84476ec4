"""The store holds exactly the pixels of the files, and a file that can't be used is named in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import Outcome, sha1, write_tif
from PIL import Image

from pcam_kaggle.artifacts import write_json
from pcam_kaggle.errors import UserError
from pcam_kaggle.patches import Damaged, prepare, read_patch
from pcam_kaggle.paths import Data
from pcam_kaggle.store import PatchStore

Command = Callable[..., Outcome]
SIZE = 96 * 96 * 3


def first_tif(data: Data, split: str = "train") -> Path:
    """Return one patch's file."""
    return min(data.patches(split).glob("*.tif"))


def test_the_store_is_what_another_reader_sees(data: Data, tmp_path: Path) -> None:
    prepare(data, tmp_path / "store")
    store = PatchStore(tmp_path / "store")
    for split in ("train", "test"):
        ids = store.ids(split)
        assert sorted(path.stem for path in data.patches(split).glob("*.tif")) == list(ids)
        shuffled = np.random.default_rng(0).permutation(ids)
        for name, patch in zip(shuffled, store.images(store.rows(split, shuffled)), strict=True):
            assert np.array_equal(patch, np.asarray(Image.open(data.patches(split) / f"{name}.tif")))
            assert sha1(patch) == name


def test_a_store_is_kept_until_a_file_changes(data: Data, tmp_path: Path) -> None:
    made, new = prepare(data, tmp_path / "store")
    assert new
    assert prepare(data, tmp_path / "store") == (made, False)
    tif = first_tif(data)
    shutil.copy(tif, tif.with_suffix(".again"))
    tif.with_suffix(".again").replace(tif)
    again, new = prepare(data, tmp_path / "store")
    assert new
    assert again["train_sha256"] == made["train_sha256"]


def flip_byte(data: Data) -> str:
    """Change one bit of one pixel."""
    tif = first_tif(data)
    content = bytearray(tif.read_bytes())
    content[len(content) // 2] ^= 1
    tif.write_bytes(content)
    return tif.name


def truncate(data: Data) -> str:
    """Cut one file in half."""
    tif = first_tif(data)
    tif.write_bytes(tif.read_bytes()[: tif.stat().st_size // 2])
    return tif.name


def empty(data: Data) -> str:
    """Leave nothing of one file."""
    first_tif(data).write_bytes(b"")
    return first_tif(data).name


def remove(data: Data) -> str:
    """Delete one file."""
    tif = first_tif(data)
    tif.unlink()
    return tif.name


def narrow(data: Data) -> str:
    """Write one patch a column too narrow."""
    tif = first_tif(data)
    write_tif(tif, np.zeros((96, 95, 3), np.uint8))
    return tif.name


def deepen(data: Data) -> str:
    """Write one patch with 16 bits."""
    tif = first_tif(data)
    cv2.imwrite(str(tif), np.zeros((96, 96, 3), np.uint16))
    return tif.name


def grey(data: Data) -> str:
    """Write one patch without colour."""
    tif = first_tif(data)
    cv2.imwrite(str(tif), np.zeros((96, 96), np.uint8))
    return tif.name


def add(data: Data) -> str:
    """Add a patch without a label."""
    patch = np.zeros((96, 96, 3), np.uint8)
    write_tif(data.patches("train") / f"{sha1(patch)}.tif", patch)
    return sha1(patch)


def _edit(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


def repeat_label(data: Data) -> str:
    """Label one patch twice."""
    _edit(data.labels, lambda table: pd.concat([table, table.iloc[[4]]]))
    return pd.read_csv(data.labels)["id"][4]


def nan_label(data: Data) -> str:
    """Leave one label out."""
    _edit(data.labels, lambda table: table.assign(label=table["label"].where(table.index != 3, "nan")))
    return pd.read_csv(data.labels)["id"][3]


def climbing_id(data: Data) -> str:
    """Name a file outside of the folder."""
    _edit(data.labels, lambda table: table.assign(id=table["id"].where(table.index != 3, "../escape")))
    return "../escape"


def unknown_sample(data: Data) -> str:
    """Ask for a test patch that is not there."""
    _edit(data.sample, lambda table: table.assign(id=table["id"].where(table.index != 3, "ab" * 20)))
    first_tif(data, "test")
    kept = set(pd.read_csv(data.sample)["id"])
    next(path for path in data.patches("test").glob("*.tif") if path.stem not in kept).unlink()
    return "ab" * 20


def no_column(data: Data) -> str:
    """Name the label's column otherwise."""
    _edit(data.labels, lambda table: table.rename(columns={"label": "target"}))
    return "no column label"


def one_class(data: Data) -> str:
    """Call everything healthy."""
    _edit(data.labels, lambda table: table.assign(label="0"))
    return data.labels.name


FAULTS = [
    *(flip_byte, truncate, empty, remove, narrow, deepen, grey, add),
    *(repeat_label, nan_label, climbing_id, unknown_sample, no_column, one_class),
]


@pytest.mark.parametrize("break_it", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("command", ["prepare", "pipeline"])
def test_a_fault_is_one_line(break_it: Callable[[Data], str], command: str, data: Data, pcam: Command, tmp_path: Path) -> None:
    named = break_it(data)
    outcome = pcam(command)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert named in outcome.err
    assert not list((tmp_path / "work").rglob("*"))


@pytest.mark.parametrize("compression", [1, 5, 8])
def test_where_and_how_a_file_keeps_its_pixels_makes_no_difference(compression: int, data: Data, tmp_path: Path) -> None:
    made, _ = prepare(data, tmp_path / "store")
    for tif in data.patches("train").glob("*.tif"):
        assert cv2.imwrite(str(tif), cv2.imread(str(tif)), [cv2.IMWRITE_TIFF_COMPRESSION, compression])
        assert sha1(np.frombuffer(tif.read_bytes()[-SIZE:], np.uint8)) != tif.stem
    again, _ = prepare(data, tmp_path / "again")
    assert made | {"signature": ""} == again | {"signature": ""}
    assert (tmp_path / "store" / "patches.npy").read_bytes() == (tmp_path / "again" / "patches.npy").read_bytes()


def test_pixels_that_have_their_ids_sha1_need_nothing_else_of_their_file(data: Data) -> None:
    tif = first_tif(data)
    patch, digest = read_patch(tif)
    assert digest.hex() == tif.stem
    tif.write_bytes(bytes(len(tif.read_bytes()) - SIZE) + patch.tobytes())
    assert np.array_equal(read_patch(tif)[0], patch)
    tif.write_bytes(patch.tobytes()[:-1] + b"?")
    with pytest.raises(Damaged):
        read_patch(tif)


def test_no_flipped_bit_of_a_header_goes_unnoticed(data: Data, tmp_path: Path) -> None:
    tif = first_tif(data)
    whole, pixels = tif.read_bytes(), sha1(read_patch(tif)[0])
    spoilt = tmp_path / "spoilt.tif"
    start = whole.rfind(b"\x00\x01", 0, 8) if whole[4:8] == b"\x08\x00\x00\x00" else int.from_bytes(whole[4:8], "little")
    for position in (*range(8), *range(max(8, start), min(len(whole), max(8, start) + 200))):
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            spoilt.write_bytes(content)
            try:
                read = sha1(read_patch(spoilt)[0])
            except Damaged:
                continue
            assert read == pixels or read != tif.stem


def test_all_faults_are_listed_at_once(data: Data, pcam: Command) -> None:
    tifs = sorted(data.patches("train").glob("*.tif"))
    tifs[0].unlink()
    tifs[1].write_bytes(b"II*")
    added = add(data)
    outcome = pcam("prepare")
    assert outcome.status == 2
    assert "3 patches" in outcome.err.splitlines()[0]
    assert all(name in outcome.err for name in (tifs[0].stem, tifs[1].stem, added))


def test_a_fault_leaves_the_old_store(data: Data, tmp_path: Path) -> None:
    made, _ = prepare(data, tmp_path / "store")
    flip_byte(data)
    with pytest.raises(UserError, match="SHA-1"):
        prepare(data, tmp_path / "store")
    assert PatchStore(tmp_path / "store").manifest == made
    assert not list(tmp_path.glob(".store*"))


def test_what_a_killed_process_was_building_is_cleared_away(data: Data, tmp_path: Path) -> None:
    (tmp_path / ".store.x1y2").mkdir()
    (tmp_path / ".store.x1y2" / "patches.npy").write_bytes(b"half")
    prepare(data, tmp_path / "store")
    assert not list(tmp_path.glob(".store*"))


def test_skip_damaged_sets_train_patches_aside(data: Data, tmp_path: Path) -> None:
    named = Path(flip_byte(data)).stem
    made, _ = prepare(data, tmp_path / "store", skip_damaged=True)
    store = PatchStore(tmp_path / "store")
    assert (made["train"], made["skipped"]) == (35, 1)
    assert named not in store.ids("train")
    assert pd.read_csv(tmp_path / "store" / "skipped.csv")["id"].tolist() == [named]


def test_skip_damaged_keeps_both_labels(data: Data, tmp_path: Path) -> None:
    labels = pd.read_csv(data.labels)
    for name in labels["id"][labels["label"] == 1]:
        (data.patches("train") / f"{name}.tif").unlink()
    with pytest.raises(UserError, match="one label is left"):
        prepare(data, tmp_path / "store", skip_damaged=True)


def test_skip_damaged_never_skips_a_test_patch(data: Data, tmp_path: Path) -> None:
    first_tif(data, "test").unlink()
    with pytest.raises(UserError, match="missing"):
        prepare(data, tmp_path / "store", skip_damaged=True)


def test_ids_that_are_names_are_declared_not_guessed(data: Data, tmp_path: Path) -> None:
    tif = first_tif(data)
    tif.rename(tif.with_name("mine.tif"))
    _edit(data.labels, lambda table: table.assign(id=table["id"].where(table["id"] != tif.stem, "mine")))
    with pytest.raises(UserError, match=r"mine.*--ids names"):
        prepare(data, tmp_path / "store")
    assert prepare(data, tmp_path / "store", ids="names")[1]
    write_json(data.declaration, {"ids": "names"})
    assert prepare(data, tmp_path / "store")[0]["ids"] == "names"


def test_ids_that_look_like_numbers_stay_text(data: Data, tmp_path: Path) -> None:
    tif = first_tif(data)
    tif.rename(tif.with_name("0012.tif"))
    _edit(data.labels, lambda table: table.assign(id=table["id"].where(table["id"] != tif.stem, "0012")))
    prepare(data, tmp_path / "store", ids="names")
    assert "0012" in PatchStore(tmp_path / "store").ids("train")
