"""Labelled patches of anyone's, beside the competition's: read, checked and held in memory."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import sha256
from pcam_kaggle.core.logs import progress
from pcam_kaggle.data.listing import (
    OTHER_PIXELS,
    SHA1,
    Problem,
    Split,
    check_listing,
    id_problems,
    missing_files,
    raise_common_problem,
    read_split,
    repeated_files,
)
from pcam_kaggle.data.prepare import Ids
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.data.tif import SHAPE, Damaged, read_patch_into

log = logging.getLogger(__name__)


class Patches(Protocol):
    """Patches that a net reads by row."""

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the patches in `rows` (n,): RGB uint8 (n, 96, 96, 3)."""


@dataclass(frozen=True, slots=True)
class LabelledPatches:
    """Patches with labels.

    Attributes:
        table: Columns id (text), label (int64) and pixels (SHA-1 of the RGB bytes), sorted by id.
        pixels: RGB uint8 (n, 96, 96, 3), in the order of `table`.
    """

    table: pd.DataFrame
    pixels: NDArray[np.uint8]

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the patches in `rows` (n,): RGB uint8 (n, 96, 96, 3)."""
        return self.pixels[rows]

    @property
    def sha256(self) -> str:
        """Hash of ids, labels and pixels."""
        return sha256(self.table.to_csv(index=False).encode())


def read_labelled(folder: Path, labels: Path, ids: Ids = "sha1") -> LabelledPatches:
    """Read the patches that `labels` lists from `folder`, 28 kB of memory each.

    TIFs that are not listed are ignored with a message.

    Args:
        folder: Holds `<id>.tif` for each id.
        labels: CSV of id,label.
        ids: With `sha1` each id must be the SHA-1 of its patch's RGB bytes, with `names` it may be any plain file name.

    Raises:
        UserError: A file is missing or damaged, or the folder or the table is not as described; `details` lists all patches.
    """
    table = read_labels(labels)
    split = read_split(folder.resolve().name, folder, labels, table["id"].tolist())
    check_listing(split)
    problems = [*missing_files(split), *repeated_files(split), *(id_problems(split) if ids == "sha1" else ())]
    raise_common_problem({split.name: split}, problems)
    pixels = np.empty((len(table), *SHAPE), np.uint8)
    rows = progress(enumerate(table["id"]), "read", len(table))
    digests = [_read(split, name, pixels[row], ids, problems) for row, name in rows]
    raise_common_problem({split.name: split}, problems)
    if problems:
        lines = list(map(str, problems))
        raise UserError(f"{folder}: patches that can't be used: {len(lines):,}; fix them: {examples(lines)}", lines)
    unlisted = len(split.files.keys() - set(split.ids))
    if unlisted:
        log.warning("%s: %s TIFs that %s does not list are ignored", folder, f"{unlisted:,}", labels.name)
    return LabelledPatches(table.assign(label=table["label"].astype(np.int64), pixels=digests), pixels)


def _read(split: Split, name: str, target: NDArray[np.uint8], ids: Ids, problems: list[Problem]) -> str:
    """Read the patch `name` into `target` and return the SHA-1 of its pixels; add what is wrong with it to `problems`."""
    file = split.files.get(name)
    if file is None:
        return ""
    try:
        digest = read_patch_into(split.folder / file, target)
        if ids == "sha1" and digest.hex() != name and SHA1.fullmatch(name):
            raise Damaged(OTHER_PIXELS)
    except Damaged as damage:
        problems.append(Problem(split.name, name, file, damage.reason, damage.advice))
        return ""
    return digest.hex()
