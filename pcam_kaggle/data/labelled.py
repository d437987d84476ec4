"""A held-out set: labelled patches beside the competition's, read, checked and held in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.files import csv_bytes, sha256
from pcam_kaggle.data.listing import Ids, list_images, read_patches, read_split
from pcam_kaggle.data.tables import read_labels


class Patches(Protocol):
    """Patches that a model reads by row."""

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the patches in `rows` (n,): RGB uint8 (n, 96, 96, 3)."""


@dataclass(frozen=True, slots=True)
class LabelledPatches:
    """Patches with labels.

    `table` has the columns id (text), label (int64) and pixels (SHA-1 of the RGB bytes), sorted by id; `pixels` are in the same
    order, RGB uint8 (n, 96, 96, 3).
    """

    table: pd.DataFrame
    pixels: NDArray[np.uint8]

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the patches in `rows` (n,): RGB uint8 (n, 96, 96, 3)."""
        return self.pixels[rows]

    @property
    def sha256(self) -> str:
        """Hash of ids, labels and pixels."""
        return sha256(csv_bytes(self.table))


def read_labelled(folder: Path, labels: Path, ids: Ids = "sha1") -> LabelledPatches:
    """Read the patches that the CSV `labels` (id, label) lists from their `<id>.tif` in `folder`, 28 kB of memory each.

    TIFs that are not listed are ignored with a warning. All patches that are missing or damaged are listed in one UserError.
    """
    table = read_labels(labels).astype({"label": np.int64})
    split = read_split(folder.resolve().name, folder, labels, table["id"].tolist())
    pixels, digests = read_patches(split, ids)
    return LabelledPatches(table.assign(pixels=digests), pixels)


def read_unlabelled(folder: Path) -> LabelledPatches:
    """Read all TIFs, PNGs and JPEGs in `folder` as `list_images` does; their ids are names, and `table` has no labels."""
    split = list_images(folder)
    pixels, digests = read_patches(split, "names")
    return LabelledPatches(pd.DataFrame({"id": [row.id for row in split.rows], "pixels": digests}), pixels)
