"""From the competition's TIFs to one packed file: every patch read once, checked, and kept by id."""

import hashlib
import os
import re
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import cv2
import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from pcam_kaggle import EXAMPLES, UserError, examples
from pcam_kaggle.config.process import end_with_parent
from pcam_kaggle.config.schema import PATCH_SIDE
from pcam_kaggle.data.atomic_io import building, file_sha256, locked, read_json, sha256, write_csv, write_json
from pcam_kaggle.data.csv_io import read_labels, read_sample
from pcam_kaggle.data.layout import Data
from pcam_kaggle.data.listing import Problem, Split, check_listing, listed_problems, read_split
from pcam_kaggle.data.near_duplicates import looks
from pcam_kaggle.data.store import is_store, whole

Ids = Literal["sha1", "names"]
SHAPE = (PATCH_SIDE, PATCH_SIDE, 3)
PATCH_BYTES = PATCH_SIDE * PATCH_SIDE * 3
SHA1 = re.compile(r"[0-9a-f]{40}")
CHUNK = 128

COPY_AGAIN = "copy the file again"
OTHER_PIXELS = "the SHA-1 of the pixels is not the id"
# Where most patches of a split have the problem, copying them again does not help.
ADVICE_FOR_ALL = {
    OTHER_PIXELS: "the files were re-encoded or resaved: take the original ones, or accept these as they are with --ids names"
}
# Values of TIFF's tag 259 that the libtiff of OpenCV's wheels decodes. It is silent on some of the others and returns black.
READABLE = {1, 5, 7, 8, 32773, 32946}
COMPRESSIONS = {
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    **dict.fromkeys((50002, 52546), "JPEG XL"),
    34887: "LERC",
    34925: "LZMA",
    34933: "PNG",
    34934: "JPEG XR",
    50000: "zstd",
    50001: "WebP",
}
# Of TIFF and BigTIFF: where the offset of the first directory stands and its format, the format of the number of entries, the
# size of an entry and where in it the value stands (TIFF 6.0, section 2; libtiff's page on BigTIFF).
DIRECTORIES = {42: (4, "I", "H", 12, 8), 43: (8, "Q", "Q", 20, 12)}


class Damaged(Exception):
    """One patch can't be used: `reason` says why, `advice` what to do about it."""

    def __init__(self, reason: str, advice: str = COPY_AGAIN) -> None:
        super().__init__(reason, advice)
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}"


class Row(NamedTuple):
    """A row of the store: the split and id of its patch, and the name of its file, None where there is none."""

    split: str
    id: str
    file: str | None


def read_patch(path: Path) -> tuple[NDArray[np.uint8], bytes]:
    """Return the patch in `path` as uint8 RGB, shape (96, 96, 3), and the SHA-1 of its bytes; raises Damaged where it is none.

    The competition's files end in their pixels and are named by the pixels' SHA-1: where a file's last bytes have it, they are
    the patch, proved by more than a decoder checks. Only other files are decoded.
    """
    try:
        with path.open("rb", buffering=0) as file:
            content = np.frombuffer(file.readall(), np.uint8)
    except FileNotFoundError:
        raise Damaged("a link whose target is missing" if path.is_symlink() else "missing") from None
    except OSError as error:
        raise Damaged(f"can't be read ({error.strerror})") from None
    pixels = content[-PATCH_BYTES:]
    digest = hashlib.sha1(pixels, usedforsecurity=False)
    if len(pixels) == PATCH_BYTES and digest.hexdigest() == path.stem:
        return pixels.reshape(SHAPE), digest.digest()
    patch = _decode(content)
    return patch, hashlib.sha1(patch, usedforsecurity=False).digest()


def _decode(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the patch in a TIF of the bytes `content`; raises Damaged where it is anything else."""
    compression = _compression(content)
    if compression not in READABLE:
        name = COMPRESSIONS.get(compression, f"method {compression}")
        raise Damaged(f"compressed with {name}, which OpenCV can't read", "re-save uncompressed")
    try:
        image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise Damaged("does not decode, is cut short or damaged")
    if image.dtype != np.uint8:
        raise Damaged(f"is {image.dtype}, not 8 bit", "save as 8-bit RGB")
    if image.shape != SHAPE:
        raise Damaged(f"is {'x'.join(map(str, image.shape))}, not {'x'.join(map(str, SHAPE))}", "take the original patch")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _compression(content: NDArray[np.uint8]) -> int:
    """Return tag 259 of the first directory of a TIFF of the bytes `content`; 1, none, where there is no such tag."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2].tobytes())
    if order is None:
        return 1
    try:
        (version,) = struct.unpack_from(f"{order}H", content, 2)
        place, offset, number, size, value = DIRECTORIES[version]
        (start,) = struct.unpack_from(order + offset, content, place)
        (count,) = struct.unpack_from(order + number, content, start)
        first = start + struct.calcsize(order + number)
        for entry in range(first, first + count * size, size):
            if struct.unpack_from(f"{order}H", content, entry) == (259,):
                return struct.unpack_from(f"{order}H", content, entry + value)[0]
    except (struct.error, KeyError, IndexError, OverflowError):
        pass
    return 1


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
    of; its `in_both` lists the ids that are train and test patches alike. A store that still belongs to the same files is kept.
    With ids `sha1` (default: as the data's dataset.json says) each id must be the SHA-1 of its patch's RGB bytes.
    `skip_damaged` sets damaged train patches aside and lists them in `skipped.csv`. Hidden files are ignored.

    Raises UserError on damaged, missing and unlabelled patches, whose `details` list them all, and in its place on the one
    mistake that explains most of them; nothing is left half-written.
    """
    ids = ids or declared_ids(data)
    labels = read_labels(data.labels)
    listed = {"train": labels["id"].tolist(), "test": read_sample(data.sample)["id"].tolist()}
    wanted = {name: read_split(data, name, listed[name]) for name in ("train", "test")}
    for split in wanted.values():
        check_listing(split)
    signature = _signature(data, wanted, ids, skip_damaged)
    with locked(store):
        kept = whole(store)
        if kept and kept["signature"] == signature:
            return kept, False
        with building(store, is_store) as folder:
            made = _build(data, labels, wanted, folder, ids, skip_damaged) | {"signature": signature}
            write_json(folder / "manifest.json", made)
    return made, True


def _build(
    data: Data, labels: pd.DataFrame, splits: dict[str, Split], folder: Path, ids: Ids, skip_damaged: bool
) -> dict[str, Any]:
    """Write the array and the tables of a store into `folder`; return its manifest."""
    rows = [Row(split.name, name, split.files.get(name)) for split in splits.values() for name in split.ids]
    listed = [problem for split in splits.values() for problem in (*listed_problems(split), *_misnamed(split, ids))]
    # Reading all files takes minutes, and most of them missing is known before.
    _refuse_common(splits, _fatal(listed, skip_damaged))
    digests, seen, damaged = _pack(data, rows, folder / "patches.npy", ids)
    problems = {(problem.split, problem.id): problem for problem in (*damaged, *listed)}
    fatal = _fatal(problems.values(), skip_damaged)
    _refuse_common(splits, fatal)
    if fatal:
        raise UserError(_message(data, fatal), list(map(str, fatal)))
    skipped = list(problems.values())
    aside = {problem.id for problem in skipped}
    if labels.loc[~labels["id"].isin(aside), "label"].nunique() < 2:
        reason, count = Counter(problem.reason for problem in skipped).most_common(1)[0]
        raise UserError(
            f"{data.root}: one label is left at most without the {len(skipped):,} damaged patches; fix them, of {count:,} the "
            f"problem is the same: {reason}",
            list(map(str, skipped)),
        )
    usable = ["skipped" if row.split == "train" and row.id in aside else row.split for row in rows]
    index = {"id": [row.id for row in rows], "split": usable, "look": [f"{look:016x}" for look in seen]}
    write_csv(folder / "index.csv", pd.DataFrame(index))
    if skipped:
        table = pd.DataFrame({"id": [p.id for p in skipped], "reason": [p.reason for p in skipped]})
        write_csv(folder / "skipped.csv", table)
    return {
        "ids": ids,
        "train": usable.count("train"),
        "test": len(splits["test"].ids),
        "skipped": len(skipped),
        "in_both": sorted({*splits["train"].ids} & {*splits["test"].ids}),
        "train_sha256": _content_sha256(rows, digests, "train", aside),
        "test_sha256": _content_sha256(rows, digests, "test", set()),
        "index_sha256": file_sha256(folder / "index.csv"),
        "index_columns": [*index],
        "bytes": (folder / "patches.npy").stat().st_size,
    }


def _signature(data: Data, splits: dict[str, Split], ids: Ids, skip_damaged: bool) -> str:
    """Hash what a store is made of: name, size and time of every patch's file, the two tables' bytes, and how to read them."""
    parts = [ids, str(skip_damaged), file_sha256(data.labels), file_sha256(data.sample)]
    for name, split in splits.items():
        stats = ((entry.name, _stat(entry)) for entry in split.tifs)
        parts += [f"{name}/{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
    return sha256("\n".join(parts).encode())


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:
        # A link that leads nowhere.
        return entry.stat(follow_symlinks=False)


def _misnamed(split: Split, ids: Ids) -> Iterator[Problem]:
    for name in split.ids if ids == "sha1" else ():
        file = split.files.get(name, f"{name}.tif")
        if SHA1.fullmatch(name.lower()) and name != name.lower():
            yield Problem(split.name, name, file, "its id is a SHA-1 with capitals", "write id and file name in lower case")
        elif not SHA1.fullmatch(name):
            yield Problem(split.name, name, file, "its id is no SHA-1", "use --ids names for a set with other ids")


def _fatal(problems: Collection[Problem], skip_damaged: bool) -> list[Problem]:
    return [problem for problem in problems if not (skip_damaged and problem.split == "train")]


def _refuse_common(splits: dict[str, Split], problems: list[Problem]) -> None:
    """Raise UserError where most patches of one of `splits` have the same problem."""
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


def _message(data: Data, problems: list[Problem]) -> str:
    if len(problems) == 1:
        return f"{data.root}/{problems[0]}"
    skip = ", or set those of train aside with --skip-damaged" if any(problem.split == "train" for problem in problems) else ""
    listed = examples([str(problem) for problem in problems])
    return f"{data.root}: {len(problems):,} patches can't be used; fix them{skip}: {listed}"


def _pack(data: Data, rows: list[Row], target: Path, ids: Ids) -> tuple[list[bytes], list[int], list[Problem]]:
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
    workers = min(joblib.cpu_count(), len(starts))
    # A forked worker inherits OpenCV's pool without its threads, and would wait for them for ever.
    cv2.setNumThreads(0)
    pack = partial(_pack_chunk, data, target, ids)
    try:
        with ProcessPoolExecutor(workers, initializer=_follow_parent) as pool:
            places = [header + start * PATCH_BYTES for start in starts]
            chunks = pool.map(pack, [rows[start : start + CHUNK] for start in starts], places)
            shown = tqdm(chunks, "prepare", len(starts), delay=2, disable=None)
            for some_digests, some_looks, some_problems in shown:
                digests += some_digests
                seen += some_looks
                problems += some_problems
                # Time and again, so that the disk writes while the workers read.
                with _writing(target) as packed:
                    os.fsync(packed.fileno())
    except BrokenProcessPool:
        raise UserError(f"{data.root}: a process that read it was killed, perhaps for want of memory; run it again") from None
    return digests, seen, problems


def _follow_parent() -> None:
    """Let the parent alone answer Ctrl-C, and end when it is killed: before filelock 4 this process holds its lock as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _pack_chunk(
    data: Data, target: Path, ids: Ids, rows: list[Row], place: int
) -> tuple[list[bytes], list[int], list[Problem]]:
    """Write the patches of `rows` into file `target` from byte `place` on; return SHA-1s, looks, and what is damaged."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    folders = {row.split: data.patches(row.split) for row in rows}
    block = np.zeros((len(rows), *SHAPE), np.uint8)
    digests: list[bytes] = []
    problems: list[Problem] = []
    for offset, row in enumerate(rows):
        digest = b""
        if row.file is not None:
            try:
                patch, digest = read_patch(folders[row.split] / row.file)
                if ids == "sha1" and digest.hex() != row.id and SHA1.fullmatch(row.id):
                    raise Damaged(OTHER_PIXELS)
                block[offset] = patch
            except Damaged as damage:
                problems.append(Problem(row.split, row.id, row.file, damage.reason, damage.advice))
        digests.append(digest)
    # Written, not mapped: where a disk is full, who writes through a map is killed without a word.
    with _writing(target) as packed:
        packed.seek(place)
        packed.write(block)
    return digests, looks(block).tolist(), problems


@contextmanager
def _writing(target: Path) -> Iterator[BinaryIO]:
    """Open `target` to write into it; raises UserError where its disk takes no more."""
    try:
        with target.open("r+b") as file:
            yield file
    except OSError as error:
        raise UserError(f"{target.parent.parent}: {error.strerror}, while the store was written; make room for it") from None


def _content_sha256(rows: list[Row], digests: list[bytes], split: str, aside: set[str]) -> str:
    kept = ((row.id, digest) for row, digest in zip(rows, digests, strict=True) if row.split == split and row.id not in aside)
    return sha256("\n".join(f"{name} {digest.hex()}" for name, digest in kept).encode())
