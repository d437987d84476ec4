"""The patch store that `prepare` writes: pixels by id."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.files import file_sha256, read_json
from pcam_kaggle.core.records import Record
from pcam_kaggle.data.tables import read_text


class StoreManifest(Record):
    """The manifest.json of a store.

    `train` and `test` are numbers of patches; `in_both` are the ids that train and test share; `train_sha256` and
    `test_sha256` hash ids and pixels, `signature` the inputs: names, sizes and times of files, the tables, and the options.
    `bytes` is the size of patches.npy. The index of earlier versions has a column perceptual_hash, too,
    and rows of damaged patches, whose split is skipped.
    """

    ids: str
    train: int
    test: int
    in_both: tuple[str, ...]
    train_sha256: str
    test_sha256: str
    index_sha256: str
    bytes: int
    signature: str


def complete_manifest(folder: Path) -> StoreManifest | None:
    """Return the manifest of the store in `folder`; None if one of its files is missing, damaged or of another store."""
    try:
        manifest = StoreManifest.read(folder / "manifest.json")
        size = (folder / "patches.npy").stat().st_size
        is_complete = (manifest.index_sha256, manifest.bytes) == (file_sha256(folder / "index.csv"), size)
    except (UserError, OSError):
        return None
    return manifest if is_complete else None


def is_store(folder: Path) -> bool:
    """Return whether `prepare` made `folder`: it has the manifest of a store of any version, complete or not."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and "index_sha256" in read_json(manifest)


class PatchStore:
    """All patches of a dataset, read through a memory map that each process opens on its first read.

    A pickled store reads the same file in another process, or raises if the file was replaced. A `folder` without a complete
    store, or whose store is replaced in the meantime, is a UserError.
    """

    def __init__(self, folder: Path) -> None:
        manifest = complete_manifest(folder)
        if manifest is None:
            advice = f"run `{program()} prepare`"
            raise UserError(f"{folder}: no patch store, or one that is incomplete or outdated; {advice}")
        # First: if the folder is replaced between the reads, `images` notices.
        self.folder, self.manifest = folder, manifest
        index = read_text(folder / "index.csv")
        self._rows = {
            split: pd.Series(rows.index.to_numpy(), index=rows["id"].to_numpy()) for split, rows in index.groupby("split")
        }
        self._images: NDArray[np.uint8] | None = None

    def ids(self, split: str) -> NDArray[np.object_]:
        """Return the ids of `split` (train or test) in the order of the store, which is sorted."""
        return self._rows[split].index.to_numpy(dtype=object)

    def rows(self, split: str, ids: NDArray[np.object_]) -> NDArray[np.int64]:
        """Return the rows of `ids`, shape (n,), all of which the store must hold."""
        rows = self._rows[split].reindex(ids)
        if rows.isna().any():
            unknown = rows.index[rows.isna()]
            raise UserError(f"{self.folder}: holds no {split} patch {unknown[0]} ({len(unknown)} such); prepare it again")
        return rows.to_numpy(np.int64)

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy of the patches in `rows` (n,): RGB uint8 (n, 96, 96, 3)."""
        if self._images is None:
            images = np.load(self.folder / "patches.npy", mmap_mode="r")
            if complete_manifest(self.folder) != self.manifest:
                raise UserError(f"{self.folder}: the patch store was replaced while it was in use; run the command again")
            self._images = images
        return self._images[rows]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}
