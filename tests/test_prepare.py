"""The store contains the exact pixels of the files, and an unusable file is named in a one-line error."""

import io
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import Outcome, sha1, write_tif
from PIL import Image

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import file_sha256, read_json, write_json
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data import prepare as packing
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels, read_sample, read_slides
from pcam_kaggle.data.tif import Damaged, read_patch

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


def spaces_around_ids(data: Data) -> str:
    """Repeat an id with a space after it."""
    _edit(data.labels, lambda table: pd.concat([table, table.iloc[[4]].assign(id=table["id"] + " ")]))
    return pd.read_csv(data.labels)["id"][4]


def short(data: Data) -> str:
    """Add a file that is shorter than a patch and has its own SHA-1 for a name."""
    name = sha1(np.frombuffer(b"short", np.uint8))
    (data.patches("train") / f"{name}.tif").write_bytes(b"short")
    _edit(data.labels, lambda table: pd.concat([table, pd.DataFrame({"id": [name], "label": ["1"]})]))
    return name


def both_extensions(data: Data) -> str:
    """Copy one file to one that differs in its extension."""
    shutil.copy(first_tif(data), first_tif(data).with_suffix(".TIFF"))
    return first_tif(data).stem


def folder(data: Data) -> str:
    """Replace one file by a folder of its name."""
    tif = first_tif(data)
    tif.unlink()
    tif.mkdir()
    return tif.name


def dangling_link(data: Data) -> str:
    """Replace one file by a link that leads nowhere."""
    tif = first_tif(data)
    tif.unlink()
    tif.symlink_to("nowhere")
    return tif.name


def link_to_itself(data: Data) -> str:
    """Replace one file by a link to itself."""
    tif = first_tif(data)
    tif.unlink()
    tif.symlink_to(tif.name)
    return tif.name


def one_class(data: Data) -> str:
    """Call everything healthy."""
    _edit(data.labels, lambda table: table.assign(label="0"))
    return data.labels.name


FAULTS = [
    *(flip_byte, truncate, empty, remove, narrow, deepen, grey, add),
    *(repeat_label, nan_label, climbing_id, unknown_sample, no_column, one_class),
    *(spaces_around_ids, short, both_extensions, folder, dangling_link, link_to_itself),
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
    assert not [path for path in (tmp_path / "work").rglob("*") if path.suffix != ".lock"]


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
                found = sha1(read_patch(spoilt)[0])
            except Damaged:
                continue
            assert found == pixels or found != tif.stem


def test_all_faults_are_listed_at_once(data: Data, pcam: Command) -> None:
    tifs = sorted(data.patches("train").glob("*.tif"))
    tifs[0].unlink()
    tifs[1].write_bytes(b"II*")
    added = add(data)
    outcome = pcam("prepare")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "3 patches" in outcome.err
    assert all(name in outcome.err for name in (tifs[0].stem, tifs[1].stem, added))


def test_a_fault_leaves_the_old_store(data: Data, tmp_path: Path) -> None:
    made, _ = prepare(data, tmp_path / "store")
    flip_byte(data)
    with pytest.raises(UserError, match="SHA-1"):
        prepare(data, tmp_path / "store")
    assert PatchStore(tmp_path / "store").manifest == made
    assert not list(tmp_path.glob(".store*.part"))


def test_what_a_killed_process_was_building_is_cleared_away(data: Data, tmp_path: Path) -> None:
    (tmp_path / ".store.part").mkdir()
    (tmp_path / ".store.part" / "patches.npy").write_bytes(b"half")
    prepare(data, tmp_path / "store")
    assert not list(tmp_path.glob(".store*.part"))


def test_skip_damaged_sets_train_patches_aside(data: Data, tmp_path: Path) -> None:
    named = Path(flip_byte(data)).stem
    made, _ = prepare(data, tmp_path / "store", skip_damaged=True)
    store = PatchStore(tmp_path / "store")
    assert (made["train"], made["skipped"]) == (35, 1)
    assert named not in store.ids("train")
    assert pd.read_csv(tmp_path / "store" / "skipped.csv")["id"].tolist() == [named]


@pytest.mark.parametrize("break_it", [short, both_extensions, folder, dangling_link, link_to_itself], ids=lambda f: f.__name__)
def test_skip_damaged_sets_aside_whatever_can_not_be_read(break_it: Callable[[Data], str], data: Data, tmp_path: Path) -> None:
    named = Path(break_it(data)).stem
    assert prepare(data, tmp_path / "store", skip_damaged=True)[0]["skipped"] == 1
    assert pd.read_csv(tmp_path / "store" / "skipped.csv")["id"].tolist() == [named]
    assert not prepare(data, tmp_path / "store", skip_damaged=True)[1]


def test_an_unreadable_file_is_a_damaged_one(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(Damaged, match="Permission denied"):
        read_patch(first_tif(data))


def test_a_damaged_patch_has_no_pixels_of_another_in_the_store(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHUNK", 2)
    packing._buffer.cache_clear()
    for number in (3, 4):
        tif = sorted(data.patches("train").iterdir())[number]
        tif.write_bytes(tif.read_bytes()[:100])
    prepare(data, tmp_path / "store", skip_damaged=True)
    index = pd.read_csv(tmp_path / "store" / "index.csv", dtype=str)
    pixels = np.load(tmp_path / "store" / "patches.npy")
    is_skipped = index["split"] == "skipped"
    assert is_skipped.sum() == 2
    assert not pixels[is_skipped].any()
    assert pixels[~is_skipped].any((1, 2, 3)).all()
    packing._buffer.cache_clear()


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


def test_spaces_around_an_id_do_not_count(data: Data) -> None:
    before = read_labels(data.labels), read_sample(data.sample)
    for table in (data.labels, data.sample):
        _edit(table, lambda table: table.assign(id=" " + table["id"] + "\t"))
    for table, was in zip((read_labels(data.labels), read_sample(data.sample)), before, strict=True):
        pd.testing.assert_frame_equal(table, was)


def test_hidden_files_are_ignored(data: Data, tmp_path: Path) -> None:
    made, _ = prepare(data, tmp_path / "store")
    for split in ("train", "test"):
        for name in (f"._{first_tif(data, split).name}", ".hidden.TIF", ".DS_Store"):
            (data.patches(split) / name).write_bytes(b"Mac OS X")
        (data.patches(split) / ".folder.tif").mkdir()
    assert prepare(data, tmp_path / "store") == (made, False)
    assert prepare(data, tmp_path / "new")[0] == made


@pytest.mark.parametrize("suffix", [".TIF", ".tiff", ".TIFF"])
def test_every_spelling_of_the_extension_is_read(suffix: str, data: Data, tmp_path: Path) -> None:
    made, _ = prepare(data, tmp_path / "store")
    for split in ("train", "test"):
        for tif in data.patches(split).glob("*.tif"):
            tif.rename(tif.with_suffix(suffix))
    again, _ = prepare(data, tmp_path / "again")
    assert made | {"signature": ""} == again | {"signature": ""}


def test_ids_in_both_sets_are_reported(data: Data, pcam: Command) -> None:
    assert "warning" not in pcam("prepare").err
    tif = first_tif(data)
    shutil.copy(tif, data.patches("test"))
    _edit(data.sample, lambda table: pd.concat([table, pd.DataFrame({"id": [tif.stem], "label": ["0"]})]))
    warning = f"warning: ids in both train and test: 1 ({tif.stem})"
    for _ in range(2):
        outcome = pcam("prepare")
        assert outcome.status == 0
        assert warning in outcome.err.splitlines()


def test_a_store_of_an_earlier_version_is_built_again(data: Data, pcam: Command, tmp_path: Path) -> None:
    assert pcam("prepare").status == 0
    store = tmp_path / "work" / "store"
    before = read_json(store / "manifest.json")
    index = store / "index.csv"
    index.write_text(index.read_text().replace("perceptual_hash", "look", 1))
    columns = ["id", "split", "look"]
    write_json(store / "manifest.json", before | {"index_columns": columns, "index_sha256": file_sha256(index)})
    assert pcam("folds").status == 0
    outcome = pcam("train")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "outdated; run `python -m pcam_kaggle prepare`" in outcome.err
    assert pcam("prepare").status == 0
    assert read_json(store / "manifest.json") == before


def tif_of(compression: int, order: str, big: bool) -> bytes:
    """Return a 96x96 RGB TIFF (BigTIFF if `big`) of one strip of zeros that claims to be compressed with `compression`."""
    offset, count, entry = ("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        f"{order}HHHQ" if big else f"{order}HI", *((43, 8, 0, 16) if big else (42, 8))
    )
    tags = {256: 96, 257: 96, 258: 8, 259: compression, 262: 2, 277: 3, 278: 96, 279: SIZE}
    start = (
        len(head) + struct.calcsize(order + count) + (len(tags) + 1) * struct.calcsize(order + entry) + struct.calcsize(offset)
    )
    body = struct.pack(order + count, len(tags) + 1)
    for tag, value in sorted((tags | {273: start}).items()):
        short = value < 2**16 and tag not in (273, 279)
        field = struct.pack(f"{order}H", value) if short else struct.pack(f"{order}I", value)
        body += struct.pack(order + entry[:-1], tag, 3 if short else 4, 1) + field.ljust(
            struct.calcsize(order + entry[-1]), b"\0"
        )
    return head + body + struct.pack(order + offset, 0) + bytes(SIZE)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_a_compression_that_opencv_can_not_read_is_named(order: str, big: bool, tmp_path: Path) -> None:
    tif = tmp_path / "patch.tif"
    tif.write_bytes(tif_of(1, order, big))
    assert not read_patch(tif)[0].any()
    for compression, name in ((50000, "zstd"), (34925, "LZMA"), (50001, "WebP"), (34712, "JPEG 2000"), (9999, "method 9999")):
        tif.write_bytes(tif_of(compression, order, big))
        with pytest.raises(Damaged, match=f"compressed with {name}, which OpenCV can't read"):
            read_patch(tif)


def test_any_bytes_are_a_patch_or_damaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tif = tmp_path / "patch.tif"
    for number in range(300):
        content = bytearray(tif_of(50000, "<>"[number % 2], number % 3 == 0)[: rng.integers(2, 300)])
        for place in rng.integers(2, len(content) + 1, 4):
            content[place : place + 8] = rng.choice([rng.bytes(8), b"\xff" * 8, b"\0" * 8, b""])
        tif.write_bytes(content)
        with pytest.raises(Damaged):
            read_patch(tif)


def png(data: Data, split: str) -> str:
    """Save all patches of a split as PNG."""
    for tif in data.patches(split).glob("*.tif"):
        Image.open(tif).save(tif.with_suffix(".png"))
        tif.unlink()
    return r"holds \d+ \.png files and 0 TIFs; take the original TIFs"


def jpg_in_class_folders(data: Data, split: str) -> str:
    """Save all patches of a split as JPEG, in a folder per class."""
    for number, tif in enumerate(sorted(data.patches(split).glob("*.tif"))):
        target = data.patches(split) / str(number % 2) / f"{tif.stem}.JPG"
        target.parent.mkdir(exist_ok=True)
        Image.open(tif).save(target)
        tif.unlink()
    return r"patches are in 2 subfolders \(0/\w+\.JPG, 1/\w+\.JPG\)"


def nested(data: Data, split: str) -> str:
    """Unpack a split into a folder of its own name."""
    shutil.move(data.patches(split), data.root / "moved")
    data.patches(split).mkdir()
    shutil.move(data.root / "moved", data.patches(split) / split)
    return rf"patches are in 1 subfolders \({split}/\w+\.tif\); move them into {split} itself"


def still_packed(data: Data, split: str) -> str:
    """Leave the archive of a split packed."""
    shutil.make_archive(str(data.patches(split)), "zip", data.patches(split))
    shutil.rmtree(data.patches(split))
    return rf"no such folder.*unpack {split}\.zip"


def no_files(data: Data, split: str) -> str:
    """Leave a split's folder with another file."""
    for tif in data.patches(split).glob("*.tif"):
        tif.unlink()
    (data.patches(split) / "readme.txt").touch()
    return r"holds no TIF but 1 other entries \(readme\.txt\); copy the patches"


def other_ids(data: Data, split: str) -> str:
    """List the ids of another set."""
    _edit(data.table(split), lambda table: table.assign(id=[f"{number:040x}" for number in range(len(table))]))
    return r"(\d+) of \1 ids .* have no file .* (\d+) of \2 TIFs are not listed .* different sets"


def capital_ids(data: Data, split: str) -> str:
    """Write the ids in capitals, as their files are not."""
    _edit(data.table(split), lambda table: table.assign(id=table["id"].str.upper()))
    return "ids differ from the names of their files in upper and lower case .*; write each id as its file is named"


def capital_ids_and_files(data: Data, split: str) -> str:
    """Write the ids and their files in capitals."""
    for tif in data.patches(split).glob("*.tif"):
        tif.rename(tif.with_name(tif.name.upper()))
    capital_ids(data, split)
    return r"(\d+) of \1 patches have the same problem: its id is a SHA-1 with capitals"


def other_kind_of_ids(data: Data, split: str) -> str:
    """Call the patches by numbers, and declare nothing."""
    for number, name in enumerate(pd.read_csv(data.table(split))["id"]):
        (data.patches(split) / f"{name}.tif").rename(data.patches(split) / f"p{number}.tif")
    _edit(data.table(split), lambda table: table.assign(id=[f"p{number}" for number in range(len(table))]))
    return r"(\d+) of \1 patches have the same problem: its id is no SHA-1 .*--ids names"


def ids_with_extension(data: Data, split: str) -> str:
    """List files, not ids."""
    _edit(data.table(split), lambda table: table.assign(id=table["id"] + ".TIF"))
    return r"(\d+) of \1 ids are not plain file names .*\.TIF.*without folder and extension"


def ids_with_folder(data: Data, split: str) -> str:
    """List paths, not ids."""
    _edit(data.table(split), lambda table: table.assign(id=f"{split}/" + table["id"] + ".tif"))
    return rf"(\d+) of \1 ids are not plain file names \('{split}/.*without folder and extension"


def reencoded(data: Data, split: str) -> str:
    """Save all patches of a split as JPEG under their old names."""
    for tif in data.patches(split).glob("*.tif"):
        buffer = io.BytesIO()
        Image.open(tif).save(buffer, "JPEG")
        tif.write_bytes(buffer.getvalue())
    return r"(\d+) of \1 patches have the same problem: the SHA-1 .*re-encoded or resaved: take the original ones.*--ids names"


def compressed(data: Data, split: str) -> str:
    """Save all patches of a split with a compression that OpenCV lacks."""
    for tif in data.patches(split).glob("*.tif"):
        tif.write_bytes(tif_of(50000, "<", big=False))
    return r"(\d+) of \1 patches have the same problem: compressed with zstd.*re-save uncompressed"


def resized(data: Data, split: str) -> str:
    """Save all patches of a split in another size."""
    for tif in data.patches(split).glob("*.tif"):
        write_tif(tif, np.zeros((224, 224, 3), np.uint8))
    return r"(\d+) of \1 patches have the same problem: is 224x224x3, not 96x96x3"


def half_copied(data: Data, split: str) -> str:
    """Lose most files of a split."""
    for tif in sorted(data.patches(split).glob("*.tif"))[1:]:
        tif.unlink()
    return "of .* patches have the same problem: missing, though listed in"


def half_listed(data: Data, split: str) -> str:
    """Lose most rows of a table."""
    _edit(data.table(split), lambda table: table.iloc[:1] if split == "test" else table.iloc[:4])
    return "of .* patches have the same problem: not listed in"


WHOLE = [
    *(png, jpg_in_class_folders, nested, still_packed, no_files, other_ids, capital_ids, capital_ids_and_files),
    *(other_kind_of_ids, ids_with_extension, ids_with_folder, reencoded, compressed, resized, half_copied, half_listed),
]
# Only the pixels show these.
SEEN_IN_PIXELS = {reencoded, compressed, resized}
SET_ASIDE = SEEN_IN_PIXELS | {capital_ids_and_files, other_kind_of_ids, half_copied, half_listed}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("break_it", WHOLE, ids=lambda mistake: mistake.__name__)
def test_one_mistake_about_a_whole_split_is_named_once(
    break_it: Callable[[Data, str], str], split: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = break_it(data, split)
    if break_it not in SEEN_IN_PIXELS:
        monkeypatch.delattr("pcam_kaggle.data.prepare._pack")
    with pytest.raises(UserError, match=cause) as caught:
        prepare(data, tmp_path / "store")
    assert split in str(caught.value) or data.table(split).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    if break_it not in SET_ASIDE or split == "test":
        with pytest.raises(UserError, match=cause):
            prepare(data, tmp_path / "store", skip_damaged=True)
    assert not list(tmp_path.glob("store*"))


def test_a_mistake_about_one_split_is_named_before_damage_of_the_other(data: Data, tmp_path: Path) -> None:
    for tif in sorted(data.patches("train").glob("*.tif"))[:10]:
        tif.unlink()
    with pytest.raises(UserError, match=reencoded(data, "test")):
        prepare(data, tmp_path / "store")


def test_most_patches_may_be_missing_with_skip_damaged(data: Data, tmp_path: Path) -> None:
    positive = pd.read_csv(data.labels).set_index("id")["label"] == 1
    kept = {*positive.index[positive][:2], *positive.index[~positive][:2]}
    for tif in data.patches("train").glob("*.tif"):
        if tif.stem not in kept:
            tif.unlink()
    made, _ = prepare(data, tmp_path / "store", skip_damaged=True)
    assert (made["train"], made["skipped"]) == (4, 32)


def test_five_of_many_damaged_patches_are_shown_and_all_are_listed(data: Data, pcam: Command, tmp_path: Path) -> None:
    tifs = sorted(data.patches("train").glob("*.tif"))[:12]
    for number, tif in enumerate(tifs):
        write_tif(tif, np.zeros((96, 97 + number, 3), np.uint8))
    outcome = pcam("prepare")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "12 patches" in outcome.err
    assert [tif.name in outcome.err for tif in tifs] == [True] * 5 + [False] * 7
    lines = (tmp_path / "work" / "error-details.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"train/{tif.name}" for tif in tifs]


FULL_SIZE = 220_025


@pytest.fixture
def full_size(data: Data) -> pd.DataFrame:
    """Return as many labels as the competition's, in a folder that holds none of their patches."""
    table = pd.DataFrame({"id": [f"{number:040x}" for number in range(FULL_SIZE)]})
    table["label"] = (table.index % 5 < 2).astype(int)
    table.to_csv(data.labels, index=False)
    for tif in data.patches("train").glob("*.tif"):
        tif.unlink()
    return table


def test_a_folder_without_patches_is_one_short_line(full_size: pd.DataFrame, data: Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train: holds no TIF.*220,025 ids") as caught:
        prepare(data, tmp_path / "store")
    assert len(str(caught.value)) < 1000
    assert list(caught.value.details) == full_size["id"].tolist()


@pytest.mark.parametrize("words", [("False", "True"), ("false", "true"), ("normal", "tumor")])
def test_labels_of_another_form_are_one_short_line(words: tuple[str, str], full_size: pd.DataFrame, data: Data) -> None:
    full_size.assign(label=np.array(words)[full_size["label"]]).to_csv(data.labels, index=False)
    expected = f"220,025 of 220,025 rows.*'{words[0]}' in 132,015 rows, '{words[1]}' in 88,010 rows; write 0 and 1"
    with pytest.raises(UserError, match=expected) as caught:
        read_labels(data.labels)
    assert len(str(caught.value)) < 1000
    assert len(caught.value.details) == FULL_SIZE


def test_five_of_many_labels_are_shown(data: Data) -> None:
    _edit(data.labels, lambda table: table.assign(label=[f"0.{number}" for number in range(10, 10 + len(table))]))
    with pytest.raises(UserError, match=r"36 of 36 .* and 31 more\): .*0\.\d\d' in 1 rows.* and 31 more; write 0 and 1"):
        read_labels(data.labels)


def test_a_long_cell_is_cut_off(tmp_path: Path) -> None:
    for cells in ("a," + "x" * 10**6, '"' + "x\n" * 10**6 + '",1'):
        (tmp_path / "labels.csv").write_text(f"id,label\n{cells}\nb,0\n")
        with pytest.raises(UserError, match="1 of 2") as caught:
            read_labels(tmp_path / "labels.csv")
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "row", "shown"),
    [
        ("Id,Label", "a,1", r"'Id', 'Label'; .*id,label"),
        ("id, label", "a, 1", r"no column label, .*'id', ' label'; .*id,label"),
        ("image_id,label", "a,1", r"no column id, .*'image_id', 'label'; .*id,label"),
        ("id;label", "a;1", r"'id;label'; .*id,label, with commas"),
        ("a,1", "b,0", r"'a', '1'; .*id,label"),
        ("id,label", "a,1,\nb,0,", "more fields than its first line"),
        ("x" * 10**6, "a", r"'x{60}…'; .*id,label"),
        (",".join(f"column{number}" for number in range(1000)), "a", "995 more"),
    ],
)
def test_a_wrong_first_line_is_shown(header: str, row: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(UserError, match=shown) as caught:
        read_labels(tmp_path / "labels.csv")
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\na,1\nb,0\n", encoding="utf-8-sig")
    assert read_labels(tmp_path / "labels.csv")["id"].tolist() == ["a", "b"]
    (tmp_path / "labels.csv").write_text("id,label\na,1\nb,0\n", encoding="utf-16")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        read_labels(tmp_path / "labels.csv")


@pytest.mark.parametrize("fault", ["repeated", "odd", "empty"])
def test_five_of_many_faulty_rows_are_shown_and_all_are_listed(fault: str, tmp_path: Path) -> None:
    names = [f"{number:040x}" for number in range(1000)]
    table = pd.DataFrame({"id": names, "wsi": "s"})
    table = {
        "repeated": pd.concat([table, table]),
        "odd": table.assign(id=table["id"] + "/" + "x" * 1000),
        "empty": table.assign(wsi=" "),
    }[fault]
    table.to_csv(tmp_path / "map.csv", index=False)
    with pytest.raises(UserError, match=r"1,000.* and 995 more") as caught:
        read_slides(tmp_path / "map.csv")
    assert len(str(caught.value)) < 1000
    assert [line.strip("'")[:40] for line in caught.value.details] == names


def test_a_missing_sample_submission_says_how_to_get_one(data: Data, pcam: Command) -> None:
    data.sample.unlink()
    outcome = pcam("prepare")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert f"{data.sample}: no such file; " in outcome.err
    rows = [f"{tif.stem},0" for tif in data.patches("test").glob("*.tif")]
    assert "the line id,label and then a line ID,0 for each ID.tif" in outcome.err
    data.sample.write_text("\n".join(["id,label", *rows]) + "\n")
    assert pcam("prepare").status == 0
