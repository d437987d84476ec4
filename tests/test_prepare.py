"""The store contains the exact pixels of the files, and an unusable file is named in a one-line error."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import Outcome, first_tif, sha1, write_tif
from PIL import Image

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import write_json
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels, read_sample, read_slides

Command = Callable[..., Outcome]
# Breaks the data, of which it gets the first train patch.
Fault = Callable[[Data, Path], object]
# Breaks the data of a split.
Mistake = Callable[[Data, str], object]


def edit(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


def add_row(table: Path, name: str) -> None:
    edit(table, lambda rows: pd.concat([rows, pd.DataFrame({"id": [name], "label": ["0"]})]))


def test_the_store_is_what_another_reader_sees(data: Data, store: PatchStore) -> None:
    for split in ("train", "test"):
        ids = store.ids(split)
        assert sorted(path.stem for path in data.patches(split).glob("*.tif")) == list(ids)
        shuffled = np.random.default_rng(0).permutation(ids)
        for name, patch in zip(shuffled, store.images(store.rows(split, shuffled)), strict=True):
            assert np.array_equal(patch, np.asarray(Image.open(data.patches(split) / f"{name}.tif")))
            assert sha1(patch) == name


def flip_bit(_: Data, tif: Path) -> None:
    content = bytearray(tif.read_bytes())
    content[len(content) // 2] ^= 1
    tif.write_bytes(content)


BLACK = np.zeros((96, 96, 3), np.uint8)
FAULTS: dict[str, Fault] = {
    "flipped bit": flip_bit,
    "two extensions": lambda _, tif: shutil.copy(tif, tif.with_suffix(".TIFF")),
    "folder": lambda _, tif: (tif.unlink(), tif.mkdir()),
    "dangling link": lambda _, tif: (tif.unlink(), tif.symlink_to("nowhere")),
    "link to itself": lambda _, tif: (tif.unlink(), tif.symlink_to(tif.name)),
    "cut short": lambda _, tif: tif.write_bytes(tif.read_bytes()[: tif.stat().st_size // 2]),
    "removed": lambda _, tif: tif.unlink(),
    "too narrow": lambda _, tif: write_tif(tif, BLACK[:, 1:]),
    "repeated": lambda data, tif: add_row(data.labels, tif.stem),
    "repeated with a space": lambda data, tif: add_row(data.labels, f"{tif.stem} "),
    "climbing id": lambda data, _: add_row(data.labels, "../escape"),
    "unknown test id": lambda data, _: add_row(data.sample, "ab" * 20),
    "one class": lambda data, _: edit(data.labels, lambda rows: rows.assign(label="0")),
}
# What the error names, if it is not the id of the first train patch.
NAMED = {"climbing id": "../escape", "unknown test id": "ab" * 20, "one class": "train_labels.csv"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(name: str, data: Data, pcam: Command, tmp_path: Path) -> None:
    named = NAMED.get(name, first_tif(data).stem)
    FAULTS[name](data, first_tif(data))
    outcome = pcam("pipeline")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith("error: ")
    assert named in outcome.err
    assert not [path for path in (tmp_path / "work").rglob("*") if path.suffix != ".lock" and path.name != "error-details.txt"]


def test_how_a_file_keeps_its_pixels_and_spells_its_extension_makes_no_difference(data: Data, store: PatchStore) -> None:
    for number, tif in enumerate([*data.patches("train").glob("*.tif"), *data.patches("test").glob("*.tif")]):
        cv2.imwrite(str(tif), cv2.imread(str(tif)), [cv2.IMWRITE_TIFF_COMPRESSION, 5])
        tif.rename(tif.with_suffix((".TIF", ".tiff", ".TIFF")[number % 3]))
    again, _ = prepare(data, store.folder.with_name("again"))
    assert again.model_copy(update={"signature": store.manifest.signature}) == store.manifest
    assert np.array_equal(np.load(store.folder.with_name("again") / "patches.npy"), np.load(store.folder / "patches.npy"))


def test_a_fault_leaves_the_old_store(data: Data, store: PatchStore, tmp_path: Path) -> None:
    flip_bit(data, first_tif(data))
    with pytest.raises(UserError, match=r"SHA-1 .*copy the original file again"):
        prepare(data, store.folder)
    assert PatchStore(store.folder).manifest == store.manifest
    assert not list(tmp_path.glob(".store*.part"))


def test_ids_that_are_names_are_declared_not_guessed(data: Data, tmp_path: Path) -> None:
    tif = first_tif(data)
    # An id that looks like a number is still text.
    tif.rename(tif.with_name("0012.tif"))
    edit(data.labels, lambda table: table.assign(id=table["id"].where(table["id"] != tif.stem, "0012")))
    with pytest.raises(UserError, match=r"0012.*--ids names"):
        prepare(data, tmp_path / "store")
    assert prepare(data, tmp_path / "store", ids="names")[1]
    assert "0012" in PatchStore(tmp_path / "store").ids("train")
    write_json(data.declaration, {"ids": "names"})
    assert not prepare(data, tmp_path / "store")[1]
    for wrong, problem in (
        ({"ids": "numbers"}, "ids: .*'sha1' or 'names'"),
        ({"id": "names"}, "ids: Field required"),
    ):
        write_json(data.declaration, wrong)
        with pytest.raises(UserError, match=f"dataset.json: {problem}; correct it"):
            prepare(data, tmp_path / "store")


def test_spaces_around_a_name_and_a_byte_order_mark_do_not_count(data: Data, tmp_path: Path) -> None:
    for path, read in ((data.labels, read_labels), (data.sample, read_sample)):
        before, table = read(path), pd.read_csv(path)
        table.assign(id=" " + table["id"] + "\t").to_csv(path, index=False, encoding="utf-8-sig")
        pd.testing.assert_frame_equal(read(path), before)
    (tmp_path / "map.csv").write_text("id,wsi\na,s1\nb,s1 \n")
    assert read_slides(tmp_path / "map.csv")["wsi"].nunique() == 1


def test_hidden_files_are_ignored(data: Data, store: PatchStore, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in (f"._{first_tif(data, split).name}", ".hidden.TIF", ".DS_Store"):
            (data.patches(split) / name).write_bytes(b"Mac OS X")
        (data.patches(split) / ".folder.tif").mkdir()
    assert prepare(data, store.folder) == (store.manifest, False)
    assert prepare(data, tmp_path / "new")[0] == store.manifest


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_that_are_not_listed_are_ignored_with_one_warning(split: str, data: Data, pcam: Command, tmp_path: Path) -> None:
    edit(data.table(split), lambda rows: rows[:5])
    listed, total = sorted(pd.read_csv(data.table(split))["id"]), len([*data.patches(split).iterdir()])
    for _ in range(2):
        outcome = pcam("prepare")
        assert (outcome.status, outcome.err.count("\n")) == (0, 1)
        assert f"warning: {data.patches(split)}: ignored {total - 5} TIFs that {data.table(split).name} does" in outcome.err
    assert PatchStore(tmp_path / "work" / "store").ids(split).tolist() == listed


def test_ids_in_both_sets_are_reported(data: Data, pcam: Command) -> None:
    assert "warning" not in pcam("prepare").err
    tif = first_tif(data)
    shutil.copy(tif, data.patches("test"))
    add_row(data.sample, tif.stem)
    for _ in range(2):
        outcome = pcam("prepare")
        assert outcome.status == 0
        assert f"warning: ids in both train and test: 1 ({tif.stem})" in outcome.err.splitlines()


def test_equal_pixels_under_two_ids_are_reported(data: Data, pcam: Command) -> None:
    labels = read_labels(data.labels)
    same, *others = labels["id"][labels["label"] == 0][:3]
    other = labels["id"][labels["label"] == 1].iloc[0]
    # The added rows have the label 0.
    copies = {"copy_0": same, "copy_1": same, "copy_2": other, "copy_3": others[0], "test_0": others[1], "test_1": other}
    for name, source in copies.items():
        split = "test" if name.startswith("test") else "train"
        shutil.copy(data.patches("train") / f"{source}.tif", data.patches(split) / f"{name}.tif")
        add_row(data.table(split), name)
    groups = [[same, "copy_0", "copy_1"], [others[0], "copy_3"], [others[1], "test_0"], [*sorted([other, "copy_2"]), "test_1"]]
    pairs = ", ".join(" = ".join(each) for each in sorted(groups))
    line = f"warning: patches with the pixels of another one: 10 ({pairs})"
    assert pcam("prepare", "--ids", "names").err.splitlines() == [line]


def each(change: Callable[[Path], object]) -> Mistake:
    return lambda data, split: [change(tif) for tif in sorted(data.patches(split).glob("*.tif"))]


def ids(change: Callable[[pd.Series], object]) -> Mistake:
    return lambda data, split: edit(data.table(split), lambda table: table.assign(id=change(table["id"])))


def move_to(name: Callable[[Path], str]) -> Mistake:
    """Return a mistake that saves each file under another name, in the format of its suffix."""

    def move(tif: Path) -> None:
        target = tif.parent / name(tif)
        target.parent.mkdir(exist_ok=True)
        Image.open(tif).save(target)
        tif.unlink()

    return each(move)


def no_files(data: Data, split: str) -> None:
    each(Path.unlink)(data, split)
    (data.patches(split) / "readme.txt").touch()


def other_kind_of_ids(data: Data, split: str) -> None:
    each(lambda tif: tif.rename(tif.with_stem(f"p{tif.stem}")))(data, split)
    ids(lambda names: "p" + names)(data, split)


def half_copied(data: Data, split: str) -> None:
    for tif in sorted(data.patches(split).glob("*.tif"))[1:]:
        tif.unlink()


SAME = r"(\d+) of \1 patches have the same problem: "
NO_NAMES = r"(\d+) of \1 ids are not plain file names .*without folder and extension"
LARGE = np.zeros((224, 224, 3), np.uint8)
# Only the pixels show these.
IN_PIXELS = {
    "re-encoded": (each(lambda tif: Image.open(tif).save(tif, "JPEG")), SAME + "the SHA-1 .*copy the original .*--ids names"),
    "cut short": (each(lambda tif: tif.write_bytes(tif.read_bytes()[:9999])), SAME + "can't be decoded.*copy the file again"),
    "resized": (each(lambda tif: write_tif(tif, LARGE)), SAME + "is 224x224 px RGB, not 96x96 px RGB"),
}
MISTAKES = {
    **IN_PIXELS,
    "capital ids": (ids(lambda names: names.str.upper()), SAME + "its id is no SHA-1 in lower case"),
    "other ids": (other_kind_of_ids, SAME + "its id is no SHA-1 .*--ids names"),
    "half copied": (half_copied, "of .* patches have the same problem: missing, though listed in"),
    "PNG": (move_to(lambda tif: f"{tif.stem}.png"), r"holds \d+ PNG or JPEG files .* and 0 TIFs; take the original TIFs"),
    "JPEG by class": (move_to(lambda tif: f"{int(tif.stem, 16) % 2}/{tif.stem}.JPG"), r"patches are in 2 subfolders \(0, 1\)"),
    "nested": (move_to(lambda tif: f"inner/{tif.name}"), r"patches are in 1 subfolders \(inner\); move them into"),
    "no files": (no_files, r"holds no TIF but 1 other entries \(readme\.txt\); copy the patches"),
    "ids with extension": (ids(lambda names: names + ".TIF"), NO_NAMES),
    "ids with folder": (ids(lambda names: "train/" + names), NO_NAMES),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", MISTAKES)
def test_one_mistake_about_a_whole_split_is_named_once(
    name: str, split: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, cause = MISTAKES[name]
    make(data, split)
    if name not in IN_PIXELS:
        monkeypatch.delattr("pcam_kaggle.data.prepare._pack")
    with pytest.raises(UserError, match=cause) as caught:
        prepare(data, tmp_path / "store")
    assert split in str(caught.value) or data.table(split).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not list(tmp_path.glob("store*"))


def test_five_of_many_damaged_patches_are_shown_and_all_are_listed(data: Data, tmp_path: Path) -> None:
    tifs = sorted(data.patches("train").glob("*.tif"))[:12]
    for number, tif in enumerate(tifs):
        write_tif(tif, np.zeros((96, 97 + number, 3), np.uint8))
    with pytest.raises(UserError, match="patches that can't be used: 12; ") as caught:
        prepare(data, tmp_path / "store")
    assert [tif.name in str(caught.value) for tif in tifs] == [True] * 5 + [False] * 7
    assert [line.split(":")[0] for line in caught.value.details] == [f"train/{tif.name}" for tif in tifs]


@pytest.mark.parametrize("name", ["train_labels.csv", "sample_submission.csv", "patch_id_wsi.csv", "train"])
def test_what_is_still_packed_is_named(name: str, data: Data, pcam: Command) -> None:
    if (data.root / name).exists():
        (data.root / name).rename(data.root / "other")
    (data.root / f"{name}.zip").touch()
    outcome = pcam("pipeline")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.endswith(f"; unpack {name}.zip\n")
    for option in ("--data", "--slides"):
        outcome = pcam("folds", option, str(data.root / f"{name}.zip"))
        assert outcome.status == 2
        assert f"; unpack {name}.zip" in outcome.err


WRONG_TABLES = {
    "space": ("id, label\na, 1", r"no column label, .*'id', ' label'; .*id,label"),
    "semicolon": ("id;label\na;1", r"'id;label'; .*id,label, with commas"),
    "no header": ("a,1\nb,0", r"'a', '1'; .*id,label"),
    "commas at the end": ("id,label\na,1,\nb,0,", "more fields than its first line"),
    "long name": ("x" * 10**6 + "\na", r"'x{60}…'; .*id,label"),
    "no rows": ("id,label", "holds no rows"),
    "no label": ("id,label\na,\nb,0", "1 of 2"),
    "long id": ('id,label\n"' + "x\n" * 10**6 + '",1\nb,0', "1 of 2"),
    "brackets": ("id,label\na (1),1\nb,0", r"'a \(1\)'.*letters, digits, points, dashes and underscores only"),
    "bytes": ("id,label\n\udcff,1", "not a CSV file in UTF-8"),
}


# In these, every row is faulty.
MANY = [f"{number:040x}" for number in range(1000)]
MAP = pd.DataFrame({"id": MANY, "wsi": "s"})
MANY_FAULTS = {
    "repeated": (read_slides, pd.concat([MAP, MAP]), "1,000 .* and 995 more"),
    "odd": (read_slides, MAP.assign(id=MAP["id"] + "/" + "x" * 1000), "1,000 .* and 995 more"),
    "empty": (read_slides, MAP.assign(wsi=" "), "1,000 .* and 995 more"),
    "words": (
        read_labels,
        pd.DataFrame({"id": MANY, "label": ["tumor", *["normal"] * 4] * 200}),
        "1,000 of 1,000 rows.* and 995 more.*'normal' in 800 rows, 'tumor' in 200 rows; write 0 and 1",
    ),
}


@pytest.mark.parametrize("name", [*WRONG_TABLES, *MANY_FAULTS])
def test_what_is_wrong_with_a_table_is_one_short_line_and_all_faults_are_listed(name: str, tmp_path: Path) -> None:
    read, table, shown = MANY_FAULTS.get(name) or (read_labels, *WRONG_TABLES[name])
    content = table if isinstance(table, str) else table.to_csv(index=False)
    (tmp_path / "table.csv").write_text(content + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=shown) as caught:
        read(tmp_path / "table.csv")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    if name in MANY_FAULTS:
        assert [line.strip("'")[:40] for line in caught.value.details] == MANY
