"""A held-out set: labelled patches beside the competition's, read, checked and held in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.files import csv_bytes, sha256
from pcam_kaggle.core.logs import progress
from pcam_kaggle.data.listing import Ids, listing_problems, raise_problems, read_row, read_split, warn_of_unlisted
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.data.tif import SHAPE


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
    table = read_labels(labels)
    split = read_split(folder.resolve().name, folder, labels, table["id"].tolist())
    raise_problems(folder, [split], listing_problems(split, ids))
    pixels = np.empty((len(table), *SHAPE), np.uint8)
    rows = zip(split.rows, pixels, strict=True)
    read = [read_row(folder, row, ids, target) for row, target in progress(rows, "read", len(table))]
    raise_problems(folder, [split], [problem for _, problem in read if problem])
    warn_of_unlisted(split)
    digests = [digest for digest, _ in read]
    return LabelledPatches(table.assign(label=table["label"].astype(np.int64), pixels=digests), pixels)
