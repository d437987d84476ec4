"""The files of a split, matched by id with the table that lists its patches, and the problems found in them."""

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pcam_kaggle.core.errors import EXAMPLES, UserError, examples
from pcam_kaggle.core.logs import progress
from pcam_kaggle.core.paths import unpack
from pcam_kaggle.data.tif import SHAPE, Damaged, read_patch

log = logging.getLogger(__name__)

# The ID scheme: an id is the SHA-1 of its patch's RGB bytes, or any plain file name.
Ids = Literal["sha1", "names"]
SHA1 = re.compile(r"[0-9a-f]{40}")
TIF = (".tif", ".tiff")
IMAGES = (*TIF, ".png", ".jpg", ".jpeg")


class Row(NamedTuple):
    """A listed patch: its split and id, and the name of its file: the first of several, `<id>.tif` if there is none."""

    split: str
    id: str
    file: str


class Problem(NamedTuple):
    """A patch that cannot be used: its split and id, the name of its file, the reason, and what the user can do."""

    split: str
    id: str
    file: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.split}/{self.file}: {self.reason}; {self.advice}"


@dataclass(frozen=True, slots=True)
class Split:
    """One split: the patches in its table, sorted by id, and the TIFs of its folder, sorted by name, without hidden ones.

    `tifs` are those of the patches, `unlisted` the names of the others.
    """

    name: str
    folder: Path
    table: Path
    rows: list[Row]
    tifs: list[os.DirEntry[str]]
    unlisted: list[str]

    def only(self, ids: Collection[str]) -> "Split":
        """Return the split without the patches, and their files, that are not in `ids`."""
        tifs = [entry for entry in self.tifs if _stem(entry.name) in ids]
        return replace(self, rows=[row for row in self.rows if row.id in ids], tifs=tifs)

    @property
    def missing(self) -> list[str]:
        """The ids that have no file."""
        names = {entry.name for entry in self.tifs}
        return [row.id for row in self.rows if row.file not in names]


def read_split(name: str, folder: Path, table: Path, ids: list[str]) -> Split:
    """Return the split called `name` in `folder`, whose `table` lists `ids`.

    A missing folder is a UserError, and so is one in which most ids have no file, if it shows why.
    """
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no such folder; it must hold the TIFs of {name}{unpack(folder)}") from None
    tifs = [entry for entry in visible if entry.name.lower().endswith(TIF)]
    others = [entry for entry in visible if not entry.name.lower().endswith(TIF)]
    files = {_stem(entry.name): entry.name for entry in reversed(tifs)}
    rows, listed = [Row(name, each, files.get(each, f"{each}.tif")) for each in sorted(ids)], set(ids)
    unlisted = [entry.name for entry in tifs if _stem(entry.name) not in listed]
    split = Split(name, folder, table, rows, [entry for entry in tifs if _stem(entry.name) in listed], unlisted)
    if 2 * len(split.missing) > len(ids):
        _explain_missing(split, tifs, others)
    return split


def list_images(folder: Path) -> Split:
    """Return the TIFs, PNGs and JPEGs in `folder` as a split whose ids are their names; raises UserError if there are none."""
    with os.scandir(folder) as entries:
        images = sorted((entry for entry in entries if _is_image(entry) and entry.name[0] != "."), key=lambda entry: entry.name)
    if not images:
        raise UserError(f"{folder}: holds no TIF, PNG or JPEG")
    name, files = folder.resolve().name, {_stem(entry.name): entry.name for entry in reversed(images)}
    return Split(name, folder, folder, [Row(name, *file) for file in sorted(files.items())], images, [])


def warn_of_unlisted(split: Split) -> None:
    """Log a warning if the folder of `split` holds TIFs that its table does not list, which are not read."""
    if split.unlisted:
        names = f"{len(split.unlisted):,} TIFs that {split.table.name} does not list ({examples(split.unlisted)})"
        log.warning("%s: ignored %s", split.folder, names)


def _explain_missing(split: Split, tifs: list[os.DirEntry[str]], others: list[os.DirEntry[str]]) -> None:
    """Raise UserError if the TIFs and the other entries in the folder of `split` show why most of its files are missing."""
    nested = [entry.name for entry in others if entry.is_dir() and any(map(_is_image, Path(entry).iterdir()))]
    if nested:
        found = f"{split.folder}: its patches are in {len(nested):,} subfolders ({examples(nested)})"
        raise UserError(f"{found}; move them into {split.name} itself", nested)
    images = [entry.name for entry in others if _is_image(entry)]
    if len(images) > len(tifs):
        raise UserError(
            f"{split.folder}: holds {len(images):,} PNG or JPEG files ({examples(images)}) and {len(tifs):,} TIFs; take "
            "the original TIFs, since another format may change pixels; convert a set of your own and use --ids names",
            images,
        )
    if not tifs:
        names = [entry.name for entry in others]
        other = f" but {len(names):,} other entries ({examples(names)})" if names else ""
        found = f"{split.folder}: holds no TIF{other}; copy the patches that {split.table.name} lists into it"
        raise UserError(f"{found}: {len(split.missing):,} ids ({examples(split.missing)})", split.missing)


def listing_problems(split: Split, ids: Ids) -> list[Problem]:
    """Return the listed patches of `split` that have no file or a second one, or no SHA-1 for an id."""
    missing, files = set(split.missing), {row.id: row.file for row in split.rows}
    second = [(_stem(entry.name), entry.name) for entry in split.tifs if files[_stem(entry.name)] != entry.name]
    found = [Problem(split.name, *file, "a second file of its id", f"remove it or {files[file[0]]}") for file in second]
    for row in split.rows:
        if ids == "sha1" and not SHA1.fullmatch(row.id):
            found.append(Problem(*row, "its id is no SHA-1 in lower case", "write it so; for other ids use --ids names"))
        elif row.id in missing:
            reason = f"missing, though listed in {split.table.name}"
            found.append(Problem(*row, reason, "copy the file again or drop the row"))
    return found


def read_row(folder: Path, row: Row, ids: Ids, target: NDArray[np.uint8]) -> tuple[str, Problem | None]:
    """Read the patch of `row` from `folder` into `target`, RGB uint8 (96, 96, 3), and check its id.

    Return the SHA-1 of its pixels, and None. If the patch can't be used, an empty text and the problem; `target` is then zero.
    """
    try:
        digest = read_patch(folder / row.file, target)
        if ids == "sha1" and digest != row.id:
            advice = "copy the original file again, or accept one that was re-encoded with --ids names"
            raise Damaged("the SHA-1 of the pixels is not the id", advice)
    except Damaged as damage:
        target[:] = 0
        return "", Problem(*row, damage.reason, damage.advice)
    return digest, None


def read_patches(split: Split, ids: Ids) -> tuple[NDArray[np.uint8], list[str]]:
    """Return the patches of `split`, RGB uint8 (n, 96, 96, 3), and their SHA-1s; raises UserError if some can't be used."""
    raise_problems(split.folder, [split], listing_problems(split, ids))
    pixels = np.empty((len(split.rows), *SHAPE), np.uint8)
    rows = zip(split.rows, pixels, strict=True)
    read = [read_row(split.folder, row, ids, target) for row, target in progress(rows, "read", len(pixels))]
    raise_problems(split.folder, [split], [problem for _, problem in read if problem])
    warn_of_unlisted(split)
    return pixels, [digest for digest, _ in read]


def raise_problems(root: Path, splits: Iterable[Split], problems: list[Problem]) -> None:
    """Raise UserError if there are `problems`: one that most patches of a split have, or else examples."""
    lines = list(map(str, problems))
    for split in splits:
        total = max(len(split.rows), len(split.tifs))
        reasons = Counter(problem.reason for problem in problems if problem.split == split.name)
        for reason, count in reasons.most_common(1):
            if count > EXAMPLES and 2 * count > total:
                same = [problem for problem in problems if (problem.split, problem.reason) == (split.name, reason)]
                found = f"{split.folder}: {count:,} of {total:,} patches have the same problem: {reason}"
                raise UserError(f"{found} ({examples([problem.file for problem in same])}); {same[0].advice}", lines)
    if problems:
        raise UserError(f"{root}: patches that can't be used: {len(lines):,}; fix them: {examples(lines)}", lines)


def _is_image(file: os.DirEntry[str] | Path) -> bool:
    return file.name.lower().endswith(IMAGES)


def _stem(file: str) -> str:
    return file.rpartition(".")[0]
