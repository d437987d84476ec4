"""From the competition's TIFs to one packed file: every patch read once, checked, and kept by id."""

import hashlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from pcam_kaggle.artifacts import building, file_sha256, read_json, sha256, write_csv, write_json
from pcam_kaggle.config import PATCH_SIDE
from pcam_kaggle.duplicates import looks
from pcam_kaggle.errors import UserError
from pcam_kaggle.paths import Data
from pcam_kaggle.store import is_store, whole
from pcam_kaggle.tables import read_labels, read_sample

Ids = Literal["sha1", "names"]
SHAPE = (PATCH_SIDE, PATCH_SIDE, 3)
PATCH_BYTES = PATCH_SIDE * PATCH_SIDE * 3
SHA1 = re.compile(r"[0-9a-f]{40}")
CHUNK = 128


class Damaged(Exception):
    """Why one patch can't be used."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A patch that can't be used, and why."""

    split: str
    id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.split}/{self.id}.tif: {self.reason}"


def read_patch(path: Path) -> tuple[NDArray[np.uint8], bytes]:
    """Return the patch in `path` as uint8 RGB, shape (96, 96, 3), and the SHA-1 of its bytes; raises Damaged where it is none.

    The competition's files end in their pixels and are named by the pixels' SHA-1: where a file's last bytes have it, they are
    the patch, proved by more than a decoder checks. Only other files are decoded.
    """
    try:
        with path.open("rb", buffering=0) as file:
            content = np.frombuffer(file.readall(), np.uint8)
    except FileNotFoundError:
        raise Damaged("missing, though its id is listed; copy the file again or drop the row") from None
    pixels = content[-PATCH_BYTES:]
    digest = hashlib.sha1(pixels, usedforsecurity=False)
    if digest.hexdigest() == path.stem:
        return pixels.reshape(SHAPE), digest.digest()
    patch = _decode(content)
    return patch, hashlib.sha1(patch, usedforsecurity=False).digest()


def _decode(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the patch in a TIF of the bytes `content`; raises Damaged where it is anything else."""
    try:
        image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise Damaged("does not decode; it is cut short or damaged, copy the file again")
    if image.dtype != np.uint8:
        raise Damaged(f"is {image.dtype}, not 8 bit")
    if image.shape != SHAPE:
        raise Damaged(f"is {'x'.join(map(str, image.shape))}, not {'x'.join(map(str, SHAPE))}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def declared_ids(data: Data) -> Ids:
    """Return how the ids of `data` are made: as its dataset.json says, else `sha1`, the competition's way."""
    if not data.declaration.is_file():
        return "sha1"
    ids = read_json(data.declaration).get("ids")
    if ids not in ("sha1", "names"):
        raise UserError(f'{data.declaration}: "ids" must be "sha1" or "names"')
    return ids


def prepare(data: Data, store: Path, ids: Ids | None = None, skip_damaged: bool = False) -> tuple[dict[str, Any], bool]:
    """Pack all patches of `data` into the folder `store`; return its manifest and whether anything was done.

    `patches.npy` is uint8 (n, 96, 96, 3) RGB, `index.csv` the split and id of each row, `manifest.json` what they were made
    of. A store that still belongs to the same files is kept. With ids `sha1` (default: as the data's dataset.json says)
    each id must be the SHA-1 of its patch's RGB bytes. `skip_damaged` sets damaged train patches aside and lists them in
    `skipped.csv`.

    Raises UserError that lists every damaged, missing and unlabelled patch; nothing is left half-written.
    """
    ids = ids or declared_ids(data)
    labels = read_labels(data.labels)
    wanted = {"train": labels["id"].tolist(), "test": sorted(read_sample(data.sample)["id"])}
    signature = _signature(data, ids, skip_damaged)
    kept = whole(store)
    if kept and kept["signature"] == signature:
        return kept, False

    with building(store, is_store) as folder:
        made = _build(data, labels, wanted, folder, ids, skip_damaged) | {"signature": signature}
        write_json(folder / "manifest.json", made)
    return made, True


def _build(
    data: Data, labels: pd.DataFrame, wanted: dict[str, list[str]], folder: Path, ids: Ids, skip_damaged: bool
) -> dict[str, Any]:
    """Write the array and the tables of a store into `folder`; return its manifest."""
    rows = [(split, name) for split in ("train", "test") for name in wanted[split]]
    digests, seen, damaged = _pack(data, rows, folder / "patches.npy", ids)
    misnamed = _misnamed(wanted) if ids == "sha1" else ()
    problems = {(problem.split, problem.id): problem for problem in (*damaged, *misnamed, *_unlabelled(data, wanted))}
    left = [problem for problem in problems.values() if not (skip_damaged and problem.split == "train")]
    if left:
        raise UserError(_listing(data, left))
    skipped = list(problems.values())
    aside = {problem.id for problem in skipped}
    if labels.loc[~labels["id"].isin(aside), "label"].nunique() < 2:
        raise UserError(f"{data.root}: without the {len(skipped)} damaged patches one label is left at most; mend them")
    usable = ["skipped" if split == "train" and name in aside else split for split, name in rows]
    index = {"id": [name for _, name in rows], "split": usable, "look": [f"{look:016x}" for look in seen]}
    write_csv(folder / "index.csv", pd.DataFrame(index))
    if skipped:
        listed = pd.DataFrame({"id": [p.id for p in skipped], "reason": [p.reason for p in skipped]})
        write_csv(folder / "skipped.csv", listed)
    return {
        "ids": ids,
        "train": usable.count("train"),
        "test": len(wanted["test"]),
        "skipped": len(skipped),
        "train_sha256": _content_sha256(rows, digests, "train", aside),
        "test_sha256": _content_sha256(rows, digests, "test", set()),
        "index_sha256": file_sha256(folder / "index.csv"),
        "index_columns": [*index],
        "bytes": (folder / "patches.npy").stat().st_size,
    }


def _signature(data: Data, ids: Ids, skip_damaged: bool) -> str:
    """Hash what a store is made of: name, size and time of every patch's file, the two tables' bytes, and how to read them."""
    parts = [ids, str(skip_damaged), file_sha256(data.labels), file_sha256(data.sample)]
    for split in ("train", "test"):
        parts += [f"{split}/{entry.name} {entry.stat().st_size} {entry.stat().st_mtime_ns}" for entry in _files(data, split)]
    return sha256("\n".join(parts).encode())


def _files(data: Data, split: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(data.patches(split)) as entries:
            return sorted((entry for entry in entries if entry.name.endswith(".tif")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{data.patches(split)}: no such folder; it must hold the TIFs of {split}") from None


def _unlabelled(data: Data, wanted: dict[str, list[str]]) -> Iterator[Problem]:
    table = {"train": data.labels.name, "test": data.sample.name}
    for split in ("train", "test"):
        known = set(wanted[split])
        for entry in _files(data, split):
            if entry.name.removesuffix(".tif") not in known:
                yield Problem(
                    split, entry.name.removesuffix(".tif"), f"has no row in {table[split]}; add the row or take the file away"
                )


def _misnamed(wanted: dict[str, list[str]]) -> Iterator[Problem]:
    for split, names in wanted.items():
        for name in names:
            if not SHA1.fullmatch(name):
                yield Problem(split, name, "its id is no SHA-1; for a set of other ids use --ids names")


def _pack(data: Data, rows: list[tuple[str, str]], target: Path, ids: Ids) -> tuple[list[bytes], list[int], list[Problem]]:
    """Read every patch of `rows` into its row of a new array at `target`; return SHA-1s, looks, and what is damaged."""
    needed, free = len(rows) * PATCH_BYTES, shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(f"{target.parent.parent}: the store needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    packed = np.lib.format.open_memmap(target, "w+", np.uint8, (len(rows), *SHAPE))
    packed.flush()
    del packed
    header = target.stat().st_size - needed
    starts = range(0, len(rows), CHUNK)
    digests: list[bytes] = []
    seen: list[int] = []
    problems: list[Problem] = []
    workers = min(os.cpu_count() or 1, len(starts))
    # A forked worker inherits OpenCV's pool without its threads, and would wait for them for ever.
    cv2.setNumThreads(0)
    pack = partial(_pack_chunk, data, target, ids)
    try:
        with ProcessPoolExecutor(workers, initializer=_leave_interrupts) as pool:
            places = [header + start * PATCH_BYTES for start in starts]
            chunks = pool.map(pack, [rows[start : start + CHUNK] for start in starts], places)
            shown = tqdm(chunks, "prepare", len(starts), delay=2, disable=None)
            for start, (some_digests, some_looks, reasons) in zip(starts, shown, strict=True):
                digests += some_digests
                seen += some_looks
                problems += [Problem(*rows[start + offset], reason) for offset, reason in reasons.items()]
                # Time and again, so that the disk writes while the workers read.
                with _writing(target) as packed:
                    os.fsync(packed.fileno())
    except BrokenProcessPool:
        raise UserError(f"{data.root}: a process that read it was killed, perhaps for want of memory; run it again") from None
    return digests, seen, problems


def _leave_interrupts() -> None:
    """Let the parent alone answer Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _pack_chunk(
    data: Data, target: Path, ids: Ids, rows: list[tuple[str, str]], place: int
) -> tuple[list[bytes], list[int], dict[int, str]]:
    """Write the patches of `rows` into file `target` from byte `place` on; return SHA-1s, looks, and what is damaged."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    folders = {split: data.patches(split) for split, _ in rows}
    block = np.zeros((len(rows), *SHAPE), np.uint8)
    digests: list[bytes] = []
    reasons: dict[int, str] = {}
    for offset, (split, name) in enumerate(rows):
        digest = b""
        try:
            patch, digest = read_patch(folders[split] / f"{name}.tif")
            if ids == "sha1" and digest.hex() != name and SHA1.fullmatch(name):
                raise Damaged(f"the SHA-1 of its pixels is {digest.hex()}; copy the file again")
            block[offset] = patch
        except Damaged as damage:
            reasons[offset] = str(damage)
        digests.append(digest)
    # Written, not mapped: where a disk is full, who writes through a map is killed without a word.
    with _writing(target) as packed:
        packed.seek(place)
        packed.write(block)
    return digests, looks(block).tolist(), reasons


@contextmanager
def _writing(target: Path) -> Iterator[BinaryIO]:
    """Open `target` to write into it; raises UserError where its disk takes no more."""
    try:
        with target.open("r+b") as file:
            yield file
    except OSError as error:
        raise UserError(f"{target.parent.parent}: {error.strerror}, while the store was written; make room for it") from None


def _content_sha256(rows: list[tuple[str, str]], digests: list[bytes], split: str, aside: set[str]) -> str:
    kept = ((name, digest) for (of, name), digest in zip(rows, digests, strict=True) if of == split and name not in aside)
    return sha256("\n".join(f"{name} {digest.hex()}" for name, digest in kept).encode())


def _listing(data: Data, problems: list[Problem]) -> str:
    if len(problems) == 1:
        return f"{data.root}/{problems[0]}"
    advice = "mend them, or set those of train aside with --skip-damaged"
    listed = [f"  {problem}" for problem in problems]
    return "\n".join([f"{data.root}: {len(problems)} patches can't be used; {advice}:", *listed])
