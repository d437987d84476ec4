"""Packs the competition's TIFs into the patch store: every patch is read once, checked, and stored by id."""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import cv2
import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import building, file_sha256, locked, read_json, sha256, write_csv, write_json
from pcam_kaggle.core.logs import progress
from pcam_kaggle.core.paths import Data
from pcam_kaggle.core.process import end_with_parent
from pcam_kaggle.data.listing import (
    OTHER_PIXELS,
    SHA1,
    Problem,
    Split,
    check_listing,
    id_problems,
    listing_problems,
    raise_common_problem,
    read_split,
)
from pcam_kaggle.data.near_duplicates import perceptual_hashes
from pcam_kaggle.data.store import INDEX_COLUMNS, complete_manifest, is_store
from pcam_kaggle.data.tables import read_labels, read_sample
from pcam_kaggle.data.tif import PATCH_BYTES, SHAPE, Damaged, read_patch_into

Ids = Literal["sha1", "names"]
# Patches that a process packs at a time; they fit into its cache.
CHUNK = 64
# The file is flushed to the disk after this many bytes, so that the disk writes while the workers read.
FLUSHED_BYTES = 64e6


class Row(NamedTuple):
    """A row of the store: split and id of its patch, and the name of its file, None if there is no file."""

    split: str
    id: str
    file: str | None


class Packed(NamedTuple):
    """What was read from the files of some rows: SHA-1 (empty for unread ones), perceptual hash, and the damaged patches."""

    digests: list[bytes]
    hashes: list[int]
    problems: list[Problem]


def declared_ids(data: Data) -> Ids:
    """Return how the ids of `data` are made: as its dataset.json declares, otherwise `sha1` as in the competition."""
    if not data.declaration.is_file():
        return "sha1"
    ids = read_json(data.declaration).get("ids")
    if ids not in ("sha1", "names"):
        raise UserError(f'{data.declaration}: "ids" must be "sha1" or "names"')
    return ids


def prepare(data: Data, store: Path, ids: Ids | None = None, skip_damaged: bool = False) -> tuple[dict[str, Any], bool]:
    """Pack all patches of `data` into the folder `store`, unless it already holds the store of the same files.

    `patches.npy` is uint8 (n, 96, 96, 3) RGB, `index.csv` has the id, split and perceptual hash of each row, and
    `manifest.json` the hashes of the content. Hidden files are ignored.

    Args:
        data: Folder in the competition's layout.
        store: Target folder, replaced atomically.
        ids: With `sha1` each id must be the SHA-1 of its patch's RGB bytes. Default: see `declared_ids`.
        skip_damaged: Skip damaged train patches and list them in `skipped.csv`.

    Returns:
        The manifest, and whether the store was written.

    Raises:
        UserError: Patches are damaged, missing or unlabelled (`details` lists all of them), or most of them have one common
            cause, which the message then names. The old store is unchanged.
    """
    ids = ids or declared_ids(data)
    labels = read_labels(data.labels)
    listed = {"train": labels["id"].tolist(), "test": read_sample(data.sample)["id"].tolist()}
    splits = {name: read_split(name, data.patches(name), data.table(name), listed[name]) for name in ("train", "test")}
    for split in splits.values():
        check_listing(split)
    signature = _signature(data, splits, ids, skip_damaged)
    with locked(store):
        existing = complete_manifest(store)
        if existing and existing["signature"] == signature:
            return existing, False
        with building(store, is_store) as folder:
            manifest = _build(data, labels, splits, folder, ids, skip_damaged) | {"signature": signature}
            write_json(folder / "manifest.json", manifest)
    return manifest, True


def _build(
    data: Data, labels: pd.DataFrame, splits: dict[str, Split], folder: Path, ids: Ids, skip_damaged: bool
) -> dict[str, Any]:
    """Write the array and the tables of a store into `folder`; return its manifest."""
    rows = [Row(split.name, name, split.files.get(name)) for split in splits.values() for name in split.ids]
    listed: list[Problem] = []
    for split in splits.values():
        listed += [*listing_problems(split), *(id_problems(split) if ids == "sha1" else ())]
    # Reading all files takes minutes, and a common problem of the listing is known before.
    raise_common_problem(splits, _fatal(listed, skip_damaged))
    packed = _pack(data, rows, folder / "patches.npy", ids)
    problems = {(problem.split, problem.id): problem for problem in (*packed.problems, *listed)}
    fatal = _fatal(problems.values(), skip_damaged)
    raise_common_problem(splits, fatal)
    if fatal:
        raise UserError(_message(data, fatal), list(map(str, fatal)))
    skipped = list(problems.values())
    skipped_ids = {problem.id for problem in skipped}
    if labels.loc[~labels["id"].isin(skipped_ids), "label"].nunique() < 2:
        reason, count = Counter(problem.reason for problem in skipped).most_common(1)[0]
        raise UserError(
            f"{data.root}: without the {len(skipped):,} damaged patches at most one label is left; fix them, {count:,} have "
            f"the same problem: {reason}",
            list(map(str, skipped)),
        )
    usable = ["skipped" if row.split == "train" and row.id in skipped_ids else row.split for row in rows]
    columns = ([row.id for row in rows], usable, [f"{value:016x}" for value in packed.hashes])
    write_csv(folder / "index.csv", pd.DataFrame(dict(zip(INDEX_COLUMNS, columns, strict=True))))
    if skipped:
        table = pd.DataFrame({"id": [p.id for p in skipped], "reason": [p.reason for p in skipped]})
        write_csv(folder / "skipped.csv", table)
    return {
        "ids": ids,
        "train": usable.count("train"),
        "test": len(splits["test"].ids),
        "skipped": len(skipped),
        "in_both": sorted({*splits["train"].ids} & {*splits["test"].ids}),
        "train_sha256": _content_sha256(rows, packed.digests, "train", skipped_ids),
        "test_sha256": _content_sha256(rows, packed.digests, "test", set()),
        "index_sha256": file_sha256(folder / "index.csv"),
        "index_columns": INDEX_COLUMNS,
        "bytes": (folder / "patches.npy").stat().st_size,
    }


def _signature(data: Data, splits: dict[str, Split], ids: Ids, skip_damaged: bool) -> str:
    """Hash the inputs of a store: name, size and time of every patch's file, the bytes of both tables, and the options."""
    parts = [ids, str(skip_damaged), file_sha256(data.labels), file_sha256(data.sample)]
    for name, split in splits.items():
        stats = ((entry.name, _stat(entry)) for entry in split.tifs)
        parts += [f"{name}/{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
    return sha256("\n".join(parts).encode())


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:
        # A dangling link.
        return entry.stat(follow_symlinks=False)


def _fatal(problems: Collection[Problem], skip_damaged: bool) -> list[Problem]:
    return [problem for problem in problems if not (skip_damaged and problem.split == "train")]


def _message(data: Data, problems: list[Problem]) -> str:
    if len(problems) == 1:
        return f"{data.root}/{problems[0]}"
    skip = ", or skip those of train with --skip-damaged" if any(problem.split == "train" for problem in problems) else ""
    listed = examples([str(problem) for problem in problems])
    return f"{data.root}: {len(problems):,} patches can't be used; fix them{skip}: {listed}"


def _pack(data: Data, rows: list[Row], target: Path, ids: Ids) -> Packed:
    """Read every patch of `rows` into its row of a new array at `target`."""
    needed, free = len(rows) * PATCH_BYTES, shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(f"{target.parent.parent}: the store needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    np.lib.format.open_memmap(target, "w+", np.uint8, (len(rows), *SHAPE)).flush()
    header = target.stat().st_size - needed
    starts = range(0, len(rows), CHUNK)
    packed = Packed([], [], [])
    workers = min(joblib.cpu_count(), len(starts))
    # A forked worker inherits OpenCV's pool without its threads and would wait for them forever.
    cv2.setNumThreads(0)
    pack = partial(_pack_chunk, data, target, ids)
    try:
        with ProcessPoolExecutor(workers, initializer=_follow_parent) as pool:
            offsets = [header + start * PATCH_BYTES for start in starts]
            chunks = pool.map(pack, [rows[start : start + CHUNK] for start in starts], offsets)
            flushed = 0
            for chunk in progress(chunks, "prepare", len(starts)):
                packed.digests.extend(chunk.digests)
                packed.hashes.extend(chunk.hashes)
                packed.problems.extend(chunk.problems)
                if (len(packed.hashes) - flushed) * PATCH_BYTES >= FLUSHED_BYTES or len(packed.hashes) == len(rows):
                    flushed = len(packed.hashes)
                    with _open_for_writing(target) as file:
                        os.fsync(file.fileno())
    except BrokenProcessPool:
        raise UserError(f"{data.root}: a process that read it was killed, perhaps for lack of memory; run it again") from None
    return packed


def _follow_parent() -> None:
    """Ignore Ctrl-C, which the parent handles, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before filelock 4, a worker that outlives its parent keeps the parent's lock.
    end_with_parent()


def _pack_chunk(data: Data, target: Path, ids: Ids, rows: list[Row], offset: int) -> Packed:
    """Write the patches of `rows` into the file `target`, from byte `offset`."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    folders = {row.split: data.patches(row.split) for row in rows}
    block = _buffer()[: len(rows)]
    digests: list[bytes] = []
    problems: list[Problem] = []
    for number, row in enumerate(rows):
        digest = b""
        is_usable = row.file is not None
        if row.file is not None:
            try:
                digest = read_patch_into(folders[row.split] / row.file, block[number])
                if ids == "sha1" and digest.hex() != row.id and SHA1.fullmatch(row.id):
                    raise Damaged(OTHER_PIXELS)
            except Damaged as damage:
                problems.append(Problem(row.split, row.id, row.file, damage.reason, damage.advice))
                is_usable = False
        if not is_usable:
            block[number] = 0
        digests.append(digest)
    # Written, not mapped: on a full disk a process that writes through a map is killed without an error.
    with _open_for_writing(target) as file:
        file.seek(offset)
        file.write(block.data)
    return Packed(digests, perceptual_hashes(block).tolist(), problems)


@lru_cache(maxsize=1)
def _buffer() -> NDArray[np.uint8]:
    """Return the memory for the patches of a chunk, which a process uses again for each: new pages cost a fifth of the time."""
    return np.empty((CHUNK, *SHAPE), np.uint8)


@contextmanager
def _open_for_writing(target: Path) -> Iterator[BinaryIO]:
    """Open the existing file `target` for writing; raise UserError if the disk is full."""
    try:
        with target.open("r+b") as file:
            yield file
    except OSError as error:
        raise UserError(f"{target.parent.parent}: {error.strerror}, while the store was written; make room for it") from None


def _content_sha256(rows: list[Row], digests: list[bytes], split: str, skipped_ids: set[str]) -> str:
    pairs = zip(rows, digests, strict=True)
    used = ((row.id, digest) for row, digest in pairs if row.split == split and row.id not in skipped_ids)
    return sha256("\n".join(f"{name} {digest.hex()}" for name, digest in used).encode())
