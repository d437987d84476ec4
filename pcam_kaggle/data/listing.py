"""What the folder of a split holds, matched by id with the table that lists its patches."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pcam_kaggle import UserError, examples
from pcam_kaggle.data.layout import Data

TIF = (".tif", ".tiff")
OTHER_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
# A folder of images shows what it is in its first entries.
GLANCE = 100


@dataclass(frozen=True, slots=True)
class Split:
    """One split: the ids that its table lists and the entries of its folder, without hidden ones, both sorted.

    `files` gives the name of the file of each id on the disk; of several files of one id, the first.
    """

    name: str
    folder: Path
    table: Path
    ids: list[str]
    tifs: list[os.DirEntry[str]]
    others: list[os.DirEntry[str]]
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Problem:
    """A patch that can't be used: its split and id, the name of its file, why, and what to do about it."""

    split: str
    id: str
    file: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.split}/{self.file}: {self.reason}; {self.advice}"


def read_split(data: Data, name: str, ids: list[str]) -> Split:
    """Return split `name` of `data`, whose table lists `ids`; raises UserError where its folder is missing."""
    folder = data.patches(name)
    try:
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        archive = folder.with_suffix(".zip")
        unpack = f"; unpack {archive.name}" if archive.is_file() else ""
        raise UserError(f"{folder}: no such folder; it must hold the TIFs of {name}{unpack}") from None
    tifs = [entry for entry in visible if _has_suffix(entry, TIF)]
    others = [entry for entry in visible if not _has_suffix(entry, TIF)]
    files = {_stem(entry.name): entry.name for entry in reversed(tifs)}
    return Split(name, folder, data.table(name), sorted(ids), tifs, others, files)


def listed_problems(split: Split) -> Iterator[Problem]:
    """Yield the patches of `split` that lack a file or a row of the table, and those with several files."""
    known = set(split.ids)
    for name in split.ids:
        if name not in split.files:
            reason = f"missing, though listed in {split.table.name}"
            yield Problem(split.name, name, f"{name}.tif", reason, "copy the file again or drop the row")
    for name, file in split.files.items():
        if name not in known:
            reason = f"not listed in {split.table.name}"
            yield Problem(split.name, name, file, reason, "add the row or remove the file")
    if len(split.files) < len(split.tifs):
        for entry in split.tifs:
            kept = split.files[_stem(entry.name)]
            if entry.name != kept:
                reason = "there are two files of this id"
                yield Problem(split.name, _stem(entry.name), entry.name, reason, f"remove it or {kept}")


def check_listing(split: Split) -> None:
    """Raise UserError where most ids of `split` have no file and its folder shows the one mistake that explains it."""
    missing = [name for name in split.ids if name not in split.files]
    if 2 * len(missing) <= len(split.ids):
        return
    for explain in CAUSES:
        error = explain(split, missing)
        if error:
            raise error


def _in_subfolders(split: Split, _: list[str]) -> UserError | None:
    glances = ((folder.name, _glance(folder)) for folder in split.others if folder.is_dir())
    found = [f"{folder}/{file}" for folder, file in glances if file]
    if not found:
        return None
    return UserError(
        f"{split.folder}: its patches are in {len(found):,} subfolders ({examples(found)}); move them into {split.name} itself",
        found,
    )


def _glance(folder: os.DirEntry[str]) -> str | None:
    """Return an image among the first entries of `folder`, None where there is none."""
    with os.scandir(folder) as entries:
        images = (entry.name for entry in islice(entries, GLANCE) if _has_suffix(entry, TIF + OTHER_IMAGES))
        return next((name for name in images if not name.startswith(".")), None)


def _in_another_format(split: Split, _: list[str]) -> UserError | None:
    suffixes = Counter(Path(entry.name).suffix for entry in split.others if _has_suffix(entry, OTHER_IMAGES))
    for suffix, count in suffixes.most_common(1):
        if count > len(split.tifs):
            return UserError(
                f"{split.folder}: holds {count:,} {suffix} files and {len(split.tifs):,} TIFs; take the original TIFs, since "
                "another format may change pixels and an id is their SHA-1; convert a set of your own and use --ids names"
            )
    return None


def _in_another_case(split: Split, missing: list[str]) -> UserError | None:
    folded = {name.casefold(): file for name, file in split.files.items()}
    found = [f"{name} for {folded[name.casefold()]}" for name in missing if name.casefold() in folded]
    if 2 * len(found) <= len(missing):
        return None
    return UserError(
        f"{split.table}: {len(found):,} ids differ from the names of their files in upper and lower case ({found[0]}); "
        "write each id as its file is named, a SHA-1 in lower case",
        found,
    )


def _without_tifs(split: Split, missing: list[str]) -> UserError | None:
    if split.tifs:
        return None
    there = [entry.name for entry in split.others]
    other = f" but {len(there):,} other entries ({examples(there)})" if there else ""
    return UserError(
        f"{split.folder}: holds no TIF{other}; copy the patches that {split.table.name} lists into it: "
        f"{len(missing):,} ids ({examples(missing)})",
        missing,
    )


def _of_another_set(split: Split, missing: list[str]) -> UserError | None:
    known = set(split.ids)
    unlisted = [file for name, file in split.files.items() if name not in known]
    if 2 * len(unlisted) <= len(split.files):
        return None
    return UserError(
        f"{split.folder}: {len(missing):,} of {len(split.ids):,} ids of {split.table.name} have no file ({missing[0]}), and "
        f"{len(unlisted):,} of {len(split.files):,} TIFs are not listed there ({unlisted[0]}); table and folder belong to "
        "different sets: take both from the same one",
        [*missing, *unlisted],
    )


CAUSES: tuple[Callable[[Split, list[str]], UserError | None], ...] = (
    *(_in_subfolders, _in_another_format, _in_another_case, _without_tifs, _of_another_set),
)


def _has_suffix(entry: os.DirEntry[str], suffixes: tuple[str, ...]) -> bool:
    return entry.name.lower().endswith(suffixes)


def _stem(file: str) -> str:
    return file.rpartition(".")[0]
