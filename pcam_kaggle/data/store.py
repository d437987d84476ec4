"""The packed patches, opened: pixels by id."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle import UserError
from pcam_kaggle.data.atomic_io import file_sha256, read_json

MANIFEST: dict[str, type] = {
    **dict.fromkeys(("train", "test", "skipped", "bytes"), int),
    **dict.fromkeys(("ids", "train_sha256", "test_sha256", "index_sha256", "signature"), str),
    "index_columns": list,
}


def whole(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the store in `folder`, None where there is none or its files are not those it describes."""
    file, index, patches = (folder / name for name in ("manifest.json", "index.csv", "patches.npy"))
    if not (file.is_file() and index.is_file() and patches.is_file()):
        return None
    try:
        manifest = read_json(file, **MANIFEST)
    except UserError:
        return None
    same = file_sha256(index) == manifest["index_sha256"] and patches.stat().st_size == manifest["bytes"]
    return manifest if same else None


def is_store(folder: Path) -> bool:
    """Tell whether `folder` has the manifest of a store, whole or not, and so was made by `prepare`."""
    try:
        return "index_sha256" in read_json(folder / "manifest.json", signature=str)
    except UserError:
        return False


class PatchStore:
    """All patches of one set, read through a memory map that each process opens when it first reads.

    A process that is given a pickled store reads the very file that was opened here, or raises.

    Raises:
        UserError: `folder` holds no whole store, or was replaced since it was opened.
    """

    def __init__(self, folder: Path) -> None:
        manifest = whole(folder)
        if manifest is None:
            raise UserError(f"{folder}: no patch store, or not a whole one; run `python -m pcam_kaggle prepare` first")
        self.folder = folder
        self.manifest = manifest
        index = pd.read_csv(folder / "index.csv", dtype=str, keep_default_na=False)
        self._rows = {
            split: pd.Series(rows.index.to_numpy(), index=rows["id"].to_numpy()) for split, rows in index.groupby("split")
        }
        self._looks = np.array([int(text, 16) for text in index["look"]], np.uint64)
        self._file = _identity(folder / "patches.npy")
        self._images: NDArray[np.uint8] | None = None
        # The folder may have been replaced between the reads above.
        if whole(folder) != manifest:
            raise self._replaced()

    def ids(self, split: str) -> NDArray[np.object_]:
        """Return the ids of `split` (train or test) in the store's order, which is sorted."""
        return self._rows[split].index.to_numpy(dtype=object)

    def rows(self, split: str, ids: NDArray[np.object_]) -> NDArray[np.int64]:
        """Return the row of each of `ids`, shape (n,); raises UserError on an id that the store does not hold."""
        rows = self._rows[split].reindex(ids)
        if rows.isna().any():
            unknown = rows.index[rows.isna()]
            raise UserError(f"{self.folder}: holds no {split} patch {unknown[0]} ({len(unknown)} such); prepare it again")
        return rows.to_numpy(np.int64)

    def looks(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the perceptual hashes of the patches in `rows`, shape (n,)."""
        return self._looks[rows]

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the patches in `rows` (n,), copied: RGB uint8 (n, 96, 96, 3).

        Raises:
            UserError: the store was replaced before this process opened it.
        """
        if self._images is None:
            self._images = self._open()
        return self._images[rows]

    def _open(self) -> NDArray[np.uint8]:
        file = self.folder / "patches.npy"
        try:
            images = np.load(file, mmap_mode="r")
            same = _identity(file) == self._file
        except OSError:
            same = False
        if not same:
            raise self._replaced()
        return images

    def _replaced(self) -> UserError:
        return UserError(f"{self.folder}: the patch store was replaced while it was in use; run the command again")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}


def _identity(file: Path) -> tuple[int, int, int, int]:
    """Return what tells `file` from another one that takes its place: device, inode, bytes and time of the last change."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
