"""Reads and validates CSV files; ids are always text.

A missing file or column, or an id that is repeated, is not a plain file name or has an image's extension, is a UserError.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import csv_bytes, sha256
from pcam_kaggle.core.paths import ALLOWED, PLAIN_NAME, unpack

IMAGE_SUFFIX = re.compile(r"\.(tiff?|png|jpe?g)$", re.IGNORECASE)
MAX_CELL = 60
SUBSET_SEED = 42


def read_text(path: Path) -> pd.DataFrame:
    """Return the CSV file in UTF-8 at `path`, each cell as its text: pandas would change ids such as NA, 007 or 1e5."""
    return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", compression=None)


def read_labels(path: Path) -> pd.DataFrame:
    """Return the labels in `path`, of both kinds: columns id (text) and label (int8, 0 or 1), sorted by id."""
    table = _read(path, ["id", "label"])
    label = table["label"].str.strip().map({"0": 0, "1": 1, "0.0": 0, "1.0": 1})
    invalid = table.loc[label.isna()]
    if len(invalid):
        found = [f"{_short(value)} in {count:,} rows" for value, count in invalid["label"].value_counts().items()]
        raise UserError(
            f"{path}: labels of {len(invalid):,} of {len(table):,} rows are neither 0 nor 1 (ids {examples(invalid['id'])}): "
            f"{examples(found)}; write 0 and 1",
            [f"{name} {value!r}" for name, value in zip(invalid["id"], invalid["label"], strict=True)],
        )
    if label.nunique() < 2:
        raise UserError(f"{path}: needs labels of both kinds, 0 and 1")
    return _by_id(table[["id"]].assign(label=label.astype(np.int8)))


def draw_subset(labels: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return a sample of `count` rows of `labels` (id, label; sorted by id), stratified by label; all rows for 0.

    The same labels give the same sample. Raises UserError if it would hold all rows, or one label only.
    """
    if not count:
        return labels
    drawn = labels.groupby("label").sample(frac=min(1, count / len(labels)), random_state=SUBSET_SEED)
    if len(drawn) == len(labels) or drawn["label"].nunique() < 2:
        raise UserError(f"subset={count}: choose fewer than the {len(labels):,} train patches, and enough for both labels")
    return _by_id(drawn)


def read_sample(path: Path) -> pd.DataFrame:
    """Return the ids of the sample submission in `path`: one column, id (text), in the order of the file."""
    if not path.is_file():
        folder = path.parent / "test"
        write = f"; take the competition's, or write the line id,label and then a line ID,0 for each ID.tif in {folder}"
        raise UserError(f"{path}: no such file{unpack(path) or write}")
    return _read(path, ["id", "label"])[["id"]]


def read_slides(path: Path) -> pd.DataFrame:
    """Return the slide map in `path`: columns id and wsi (both text, not empty), sorted by id."""
    table = _read(path, ["id", "wsi"])
    table = table.assign(wsi=table["wsi"].str.strip())
    if empty := table.loc[table["wsi"] == "", "id"].tolist():
        raise UserError(f"{path}: rows without a slide: {len(empty):,} (ids {examples(empty)}); correct or drop them", empty)
    return _by_id(table)


def read_numbers(path: Path, columns: list[str]) -> pd.DataFrame:
    """Return the numbers in `path`: columns id (text) and `columns` (float64, finite)."""
    table = _read(path, ["id", *columns])
    try:
        numbers = table[columns].astype(np.float64)
    except ValueError as error:
        raise UserError(f"{path}: {str(error)[:200]}; correct or delete it and run the command again") from None
    if not np.isfinite(numbers.to_numpy()).all():
        raise UserError(f"{path}: holds a number that is not finite; correct or delete it and run the command again")
    return pd.concat([table[["id"]], numbers], axis=1)


def labels_sha256(labels: pd.DataFrame) -> str:
    """Return the SHA-256 of the columns id and label, independent of the order of rows."""
    return sha256(csv_bytes(_by_id(labels[["id", "label"]].astype({"label": np.int8}))))


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Return `columns`, of which `id` is the first, of the CSV file at `path` as text."""
    try:
        table = read_text(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{unpack(path)}") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({' '.join(str(error).split())[:200]}){unpack(path)}") from None
    if missing := [column for column in columns if column not in table]:
        found = examples(list(map(_short, table.columns)))
        raise UserError(
            f"{path}: has no column {' or '.join(missing)}, its columns are {found}; its first line must be "
            f"{','.join(columns)}, with commas and without spaces",
            list(map(repr, table.columns)),
        )
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{path}: its rows have more fields than its first line; end no row in a comma")
    if table.empty:
        raise UserError(f"{path}: holds no rows")
    table = table[columns].assign(id=table["id"].str.strip())
    if invalid := [text for text in table["id"] if not PLAIN_NAME.fullmatch(text) or IMAGE_SUFFIX.search(text)]:
        raise UserError(
            f"{path}: {len(invalid):,} of {len(table):,} ids are not plain file names "
            f"({examples(list(map(_short, invalid)))}); write each without folder and extension, as abc for train/abc.tif, "
            f"with {ALLOWED} only, or drop its row",
            list(map(repr, invalid)),
        )
    if repeated := table.loc[table["id"].duplicated(), "id"].drop_duplicates().tolist():
        found = f"{path}: ids in more than one row: {len(repeated):,} ({examples(repeated)})"
        raise UserError(f"{found}; keep one row of each", repeated)
    return table


def _short(text: str) -> str:
    # In quotes, truncated: a cell of a damaged file may be as long as the file.
    return repr(text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}…")


def _by_id(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("id", kind="stable").reset_index(drop=True)
