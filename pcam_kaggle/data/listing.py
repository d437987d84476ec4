"""The files of a split, matched by id with the table that lists its patches, and the problems found in them."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pcam_kaggle.core.errors import EXAMPLES, UserError, examples
from pcam_kaggle.data.tif import Damaged, read_patch

# The ID scheme: an id is the SHA-1 of its patch's RGB bytes, or any plain file name.
Ids = Literal["sha1", "names"]
SHA1 = re.compile(r"[0-9a-f]{40}")
TIF = (".tif", ".tiff")
OTHER_IMAGES = (".png", ".jpg", ".jpeg")
OTHER_PIXELS = "the SHA-1 of the pixels is not the id"
# If most patches of a split have the problem, copying them again does not help.
ADVICE_FOR_ALL = {
    OTHER_PIXELS: "the files were re-encoded or resaved: take the original ones, or accept these as they are with --ids names"
}


class Row(NamedTuple):
    """A listed patch: its split and id, and the name of its file, None if there is no file."""

    split: str
    id: str
    file: str | None


@dataclass(frozen=True, slots=True)
class Problem:
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
    """One split: the ids in its table, sorted, and the entries of its folder, without hidden ones.

    `files` maps each id on the disk to the name of its file; of several files with one id, to the first.
    """

    name: str
    folder: Path
    table: Path
    ids: list[str]
    tifs: list[os.DirEntry[str]]
    others: list[os.DirEntry[str]]
    files: dict[str, str]

    @property
    def rows(self) -> list[Row]:
        """The listed patches, sorted by id."""
        return [Row(self.name, name, self.files.get(name)) for name in self.ids]


def read_split(name: str, folder: Path, table: Path, ids: list[str]) -> Split:
    """Return the split called `name` in `folder`, whose `table` lists `ids`.

    Raises:
        UserError: The folder is missing; or most ids have no file, and the folder shows why.
    """
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        archive = folder.with_suffix(".zip")
        unpack = f"; unpack {archive.name}" if archive.is_file() else ""
        raise UserError(f"{folder}: no such folder; it must hold the TIFs of {name}{unpack}") from None
    tifs = [entry for entry in visible if entry.name.lower().endswith(TIF)]
    others = [entry for entry in visible if not entry.name.lower().endswith(TIF)]
    files = {_stem(entry.name): entry.name for entry in reversed(tifs)}
    split = Split(name, folder, table, sorted(ids), tifs, others, files)
    missing = [name for name in split.ids if name not in files]
    if 2 * len(missing) > len(ids):
        _explain_missing(split, missing)
    return split


def _explain_missing(split: Split, missing: list[str]) -> None:
    """Raise UserError if the folder of `split` shows why most of its files are missing."""
    nested = [f"{entry.name}/{file}" for entry in split.others if entry.is_dir() and (file := _first_image(entry))]
    if nested:
        found = f"{split.folder}: its patches are in {len(nested):,} subfolders ({examples(nested)})"
        raise UserError(f"{found}; move them into {split.name} itself", nested)
    images = Counter(suffix for entry in split.others if (suffix := Path(entry.name).suffix.lower()) in OTHER_IMAGES)
    for suffix, count in images.most_common(1):
        if count > len(split.tifs):
            raise UserError(
                f"{split.folder}: holds {count:,} {suffix} files and {len(split.tifs):,} TIFs; take the original TIFs, since "
                "another format may change pixels and an id is their SHA-1; convert a set of your own and use --ids names"
            )
    if not split.tifs:
        names = [entry.name for entry in split.others]
        other = f" but {len(names):,} other entries ({examples(names)})" if names else ""
        raise UserError(
            f"{split.folder}: holds no TIF{other}; copy the patches that {split.table.name} lists into it: "
            f"{len(missing):,} ids ({examples(missing)})",
            missing,
        )


def _first_image(folder: os.DirEntry[str]) -> str | None:
    with os.scandir(folder) as entries:
        return next((entry.name for entry in entries if entry.name.lower().endswith((*TIF, *OTHER_IMAGES))), None)


def listing_problems(split: Split, ids: Ids) -> Iterator[Problem]:
    """Yield the listed patches of `split` without a file, those with several files, and ids that are no SHA-1."""
    for name in split.ids:
        file = split.files.get(name, f"{name}.tif")
        if ids == "sha1" and not SHA1.fullmatch(name):
            yield Problem(split.name, name, file, "its id is no SHA-1 in lower case", "use --ids names for other ids")
        elif name not in split.files:
            reason = f"missing, though listed in {split.table.name}"
            yield Problem(split.name, name, file, reason, "copy the file again or drop the row")
    for entry in split.tifs:
        first = split.files[_stem(entry.name)]
        if entry.name != first:
            reason = "there are two files of this id"
            yield Problem(split.name, _stem(entry.name), entry.name, reason, f"remove it or {first}")


def unlisted_files(split: Split) -> Iterator[Problem]:
    """Yield the files of `split` that its table does not list."""
    for name in sorted(split.files.keys() - set(split.ids)):
        reason = f"not listed in {split.table.name}"
        yield Problem(split.name, name, split.files[name], reason, "add the row or remove the file")


def read_row(folder: Path, row: Row, ids: Ids, target: NDArray[np.uint8]) -> tuple[str, Problem | None]:
    """Read the patch of `row` from `folder` into `target`, RGB uint8 (96, 96, 3), and check its id.

    Returns:
        The SHA-1 of its pixels and None. If the patch cannot be used, `target` is zero and the SHA-1 empty; the problem is None
        where `listing_problems` names it.
    """
    problem = None
    if row.file is not None:
        try:
            digest = read_patch(folder / row.file, target)
            if ids == "names" or digest == row.id:
                return digest, None
            problem = Problem(row.split, row.id, row.file, OTHER_PIXELS, Damaged(OTHER_PIXELS).advice)
        except Damaged as damage:
            problem = Problem(row.split, row.id, row.file, damage.reason, damage.advice)
    target[:] = 0
    return "", problem


def raise_common_problem(splits: Iterable[Split], problems: list[Problem]) -> None:
    """Raise UserError if most patches of one of `splits` have the same one of `problems`."""
    for split in splits:
        own = [problem for problem in problems if problem.split == split.name]
        total = max(len(split.ids), len(split.files))
        for reason, count in Counter(problem.reason for problem in own).most_common(1):
            if count > EXAMPLES and 2 * count > total:
                same = [problem for problem in own if problem.reason == reason]
                files = examples([problem.file for problem in same])
                advice = ADVICE_FOR_ALL.get(reason, same[0].advice)
                raise UserError(
                    f"{split.folder}: {count:,} of {total:,} patches have the same problem: {reason} ({files}); {advice}",
                    list(map(str, problems)),
                )


def raise_problems(root: Path, splits: Iterable[Split], problems: list[Problem], advice: str = "fix them") -> None:
    """Raise UserError if there are `problems`: names the common one, or `root`, `advice` and examples; `details` lists all."""
    raise_common_problem(splits, problems)
    if problems:
        lines = list(map(str, problems))
        raise UserError(f"{root}: patches that can't be used: {len(lines):,}; {advice}: {examples(lines)}", lines)


def _stem(file: str) -> str:
    return file.rpartition(".")[0]
