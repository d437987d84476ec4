"""The packed patches, opened: pixels by id."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.artifacts import file_sha256, read_json
from pcam_kaggle.errors import UserError

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


class PatchStore:
    """All patches of one set, read through a memory map; small to pickle, since a worker opens the map itself.

    Raises UserError where `folder` holds no whole store.
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
        self._images = self._open()

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
        """Return the patches in `rows` (n,), copied: RGB uint8 (n, 96, 96, 3)."""
        return self._images[rows]

    def _open(self) -> NDArray[np.uint8]:
        return np.load(self.folder / "patches.npy", mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = self._open()
