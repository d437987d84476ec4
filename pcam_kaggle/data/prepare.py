"""Packs the competition's TIFs into the patch store: every patch is read once, checked, and stored by id."""

import logging
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import building, file_sha256, locked, sha256, write_csv
from pcam_kaggle.core.logs import progress
from pcam_kaggle.core.paths import Data
from pcam_kaggle.core.process import end_with_parent
from pcam_kaggle.core.records import Record
from pcam_kaggle.data.listing import (
    Ids,
    Problem,
    Row,
    Split,
    listing_problems,
    raise_problems,
    read_row,
    read_split,
    warn_of_unlisted,
)
from pcam_kaggle.data.store import StoreManifest, complete_manifest, is_store
from pcam_kaggle.data.tables import draw_subset, read_labels, read_sample
from pcam_kaggle.data.tif import PATCH_BYTES, SHAPE

log = logging.getLogger(__name__)

# Patches that a process packs at a time; they fit into its cache.
CHUNK = 64


class Declaration(Record):
    """The optional dataset.json beside the patches."""

    advice = "correct it"
    ids: Ids


def prepare(data: Data, store: Path, ids: Ids | None = None, subset: int = 0) -> tuple[StoreManifest, bool]:
    """Pack the patches of `data`, of train only a `subset` unless 0, into the folder `store`, unless it holds them already.

    `patches.npy` is uint8 (n, 96, 96, 3) RGB, `index.csv` has the id and split of each row, and `manifest.json` the hashes of
    the content. The ID scheme is by default what dataset.json declares, or `sha1`. Hidden files are ignored, and those that are
    not listed, with a warning. Returns the manifest, and whether the store was written.

    Patches that are damaged or missing are a UserError that lists all of them; the old store is then unchanged.
    """
    ids = ids or (Declaration.read(data.declaration).ids if data.declaration.is_file() else "sha1")
    labels = read_labels(data.labels)
    listed = {"train": labels["id"].tolist(), "test": read_sample(data.sample)["id"].tolist()}
    train, test = (read_split(name, data.patches(name), data.table(name), listed[name]) for name in ("train", "test"))
    labels = draw_subset(labels, subset)
    splits = [train.only(set(labels["id"])), test]
    signature = _signature(data, splits, ids)
    with locked(store):
        manifest = existing = complete_manifest(store)
        if manifest is None or manifest.signature != signature:
            with building(store, is_store) as folder:
                manifest = _build(data, splits, folder, ids, signature)
                manifest.write(folder / "manifest.json")
    for split in splits:
        warn_of_unlisted(split)
    return manifest, manifest is not existing


def _build(data: Data, splits: list[Split], folder: Path, ids: Ids, signature: str) -> StoreManifest:
    # Before the files are read, which takes minutes.
    raise_problems(data.root, splits, [problem for split in splits for problem in listing_problems(split, ids)])
    rows = [row for split in splits for row in split.rows]
    read = _pack(data, rows, folder / "patches.npy", ids)
    raise_problems(data.root, splits, [problem for _, problem in read if problem])
    index = pd.DataFrame({"id": [row.id for row in rows], "split": [row.split for row in rows]})
    write_csv(folder / "index.csv", index)
    index["pixels"] = [digest for digest, _ in read]
    _warn_of_equal_pixels(index)
    hashes = {
        split: sha256("\n".join(patches["id"] + " " + patches["pixels"]).encode()) for split, patches in index.groupby("split")
    }
    return StoreManifest(
        ids=ids,
        train=len(splits[0].rows),
        test=len(splits[1].rows),
        in_both=tuple(sorted(set.intersection(*({row.id for row in split.rows} for split in splits)))),
        train_sha256=hashes["train"],
        test_sha256=hashes["test"],
        index_sha256=file_sha256(folder / "index.csv"),
        bytes=(folder / "patches.npy").stat().st_size,
        signature=signature,
    )


def _warn_of_equal_pixels(index: pd.DataFrame) -> None:
    equal = index.drop_duplicates("id").groupby("pixels", sort=False)["id"].filter(lambda ids: len(ids) > 1)
    pairs = [" = ".join(ids) for _, ids in equal.groupby(index["pixels"], sort=False)]
    if pairs:
        log.warning("patches with the pixels of another one: %s (%s)", f"{len(equal):,}", examples(pairs))


def _signature(data: Data, splits: list[Split], ids: Ids) -> str:
    """Hash the inputs of a store: name, size and time of every patch's file, the bytes of both tables, and the ID scheme."""
    # Earlier versions had an option here, without which their stores are still up to date.
    parts = [ids, str(False), file_sha256(data.labels), file_sha256(data.sample)]
    for split in splits:
        for entry in split.tifs:
            # A dangling link has no status but its own.
            stat = entry.stat(follow_symlinks=not entry.is_symlink() or Path(entry).exists())
            parts.append(f"{split.name}/{entry.name} {stat.st_size} {stat.st_mtime_ns}")
    return sha256("\n".join(parts).encode())


def _pack(data: Data, rows: list[Row], target: Path, ids: Ids) -> list[tuple[str, Problem | None]]:
    """Read every patch of `rows` into its row of a new array at `target`; return for each what `read_row` returns."""
    needed, free = len(rows) * PATCH_BYTES, shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(f"{target.parent.parent}: the store needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    np.lib.format.open_memmap(target, "w+", np.uint8, (len(rows), *SHAPE)).flush()
    header = target.stat().st_size - needed
    starts = range(0, len(rows), CHUNK)
    read: list[tuple[str, Problem | None]] = []
    try:
        with ProcessPoolExecutor(min(joblib.cpu_count(), len(starts)), initializer=_follow_parent) as pool:
            offsets = [header + start * PATCH_BYTES for start in starts]
            chunks = pool.map(partial(_pack_chunk, data, target, ids), [rows[n : n + CHUNK] for n in starts], offsets)
            for chunk in progress(chunks, "prepare", len(starts)):
                read += chunk
        with target.open("r+b") as file:
            os.fsync(file.fileno())
    except BrokenProcessPool:
        raise UserError(f"{data.root}: a process that read it was killed, perhaps for lack of memory; run it again") from None
    except OSError as error:
        # If not all processes could be started, the first ones would wait for work, and this process for them.
        for process in multiprocessing.active_children():
            process.terminate()
        # The semaphores of the processes are files of shared memory.
        place = error.filename or f"{target.parent.parent} or /dev/shm"
        raise UserError(f"{place}: {error.strerror}, while the store was written; fix that and run it again") from None
    return read


def _follow_parent() -> None:
    # Ctrl-C is handled by the parent. Before filelock 4, a worker that outlives its parent keeps the parent's lock.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _pack_chunk(data: Data, target: Path, ids: Ids, rows: list[Row], offset: int) -> list[tuple[str, Problem | None]]:
    block = np.empty((len(rows), *SHAPE), np.uint8)
    read = [read_row(data.patches(row.split), row, ids, patch) for row, patch in zip(rows, block, strict=True)]
    # Written, not mapped: on a full disk a process that writes through a map is killed without an error.
    with target.open("r+b") as file:
        file.seek(offset)
        file.write(block.data)
    return read
