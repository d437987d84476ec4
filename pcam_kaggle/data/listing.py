"""The files of a split, matched by id with the table that lists its patches, and the problems found in them."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pcam_kaggle.core.errors import EXAMPLES, UserError, examples

TIF = (".tif", ".tiff")
OTHER_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
SHA1 = re.compile(r"[0-9a-f]{40}")
# Entries that are read from a subfolder to tell whether it contains images.
SUBFOLDER_ENTRIES = 100
OTHER_PIXELS = "the SHA-1 of the pixels is not the id"
# If most patches of a split have the problem, copying them again does not help.
ADVICE_FOR_ALL = {
    OTHER_PIXELS: "the files were re-encoded or resaved: take the original ones, or accept these as they are with --ids names"
}


@dataclass(frozen=True, slots=True)
class Split:
    """One split: the ids in its table and the entries of its folder, both sorted; hidden entries are left out.

    `files` maps each id on the disk to the name of its file; of several files with one id, to the first.
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
    """A patch that cannot be used: its split and id, the name of its file, the reason, and what the user can do."""

    split: str
    id: str
    file: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.split}/{self.file}: {self.reason}; {self.advice}"


def read_split(name: str, folder: Path, table: Path, ids: list[str]) -> Split:
    """Return the split called `name` in `folder`, whose `table` lists `ids`.

    Raises:
        UserError: The folder is missing.
    """
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
    return Split(name, folder, table, sorted(ids), tifs, others, files)


def listing_problems(split: Split) -> Iterator[Problem]:
    """Yield the patches of `split` that lack a file or a row of the table, and those with several files."""
    yield from missing_files(split)
    known = set(split.ids)
    for name, file in split.files.items():
        if name not in known:
            reason = f"not listed in {split.table.name}"
            yield Problem(split.name, name, file, reason, "add the row or remove the file")
    yield from repeated_files(split)


def repeated_files(split: Split) -> Iterator[Problem]:
    """Yield the files of `split` beside which another file has the same id."""
    for entry in split.tifs:
        first = split.files[_stem(entry.name)]
        if entry.name != first:
            reason = "there are two files of this id"
            yield Problem(split.name, _stem(entry.name), entry.name, reason, f"remove it or {first}")


def missing_files(split: Split) -> Iterator[Problem]:
    """Yield the patches that the table of `split` lists and its folder lacks."""
    for name in split.ids:
        if name not in split.files:
            reason = f"missing, though listed in {split.table.name}"
            yield Problem(split.name, name, f"{name}.tif", reason, "copy the file again or drop the row")


def id_problems(split: Split) -> Iterator[Problem]:
    """Yield the patches of `split` whose id is not a SHA-1 in lower case."""
    for name in split.ids:
        file = split.files.get(name, f"{name}.tif")
        if not SHA1.fullmatch(name.lower()):
            yield Problem(split.name, name, file, "its id is no SHA-1", "use --ids names for a set with other ids")
        elif name != name.lower():
            yield Problem(split.name, name, file, "its id is a SHA-1 with capitals", "write id and file name in lower case")


def raise_common_problem(splits: dict[str, Split], problems: list[Problem]) -> None:
    """Raise UserError if most patches of one of `splits` have the same problem."""
    counts = Counter((problem.split, problem.reason) for problem in problems)
    for (name, reason), count in counts.most_common():
        split = splits[name]
        total = max(len(split.ids), len(split.files))
        if count > EXAMPLES and 2 * count > total:
            same = [problem for problem in problems if (problem.split, problem.reason) == (name, reason)]
            files = examples([problem.file for problem in same])
            advice = ADVICE_FOR_ALL.get(reason, same[0].advice)
            raise UserError(
                f"{split.folder}: {count:,} of {total:,} patches have the same problem: {reason} ({files}); {advice}",
                list(map(str, problems)),
            )


def check_listing(split: Split) -> None:
    """Raise UserError if most ids of `split` have no file and its folder shows one common cause."""
    missing = [name for name in split.ids if name not in split.files]
    if 2 * len(missing) <= len(split.ids):
        return
    for explain in CAUSES:
        error = explain(split, missing)
        if error:
            raise error


def _in_subfolders(split: Split, _: list[str]) -> UserError | None:
    images = ((folder.name, _first_image(folder)) for folder in split.others if folder.is_dir())
    found = [f"{folder}/{file}" for folder, file in images if file]
    if not found:
        return None
    return UserError(
        f"{split.folder}: its patches are in {len(found):,} subfolders ({examples(found)}); move them into {split.name} itself",
        found,
    )


def _first_image(folder: os.DirEntry[str]) -> str | None:
    """Return an image among the first entries of `folder`, None if there is none."""
    with os.scandir(folder) as entries:
        images = (entry.name for entry in islice(entries, SUBFOLDER_ENTRIES) if _has_suffix(entry, TIF + OTHER_IMAGES))
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
    names = [entry.name for entry in split.others]
    other = f" but {len(names):,} other entries ({examples(names)})" if names else ""
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
