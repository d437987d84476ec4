"""The CSV files that come in, read with ids as text and checked at the door."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.artifacts import csv_bytes, sha256
from pcam_kaggle.errors import UserError, examples

# What a fold's net leaves, and the numbers in it.
PREDICTIONS = {"oof.csv": ["label", "probability"], "test.csv": ["probability"]}
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def read_labels(path: Path) -> pd.DataFrame:
    """Return the labels in `path`: `id` (text) and `label` (int8, 0 or 1), sorted by id whatever the order of the rows.

    Raises UserError on a missing column, an id that is no plain file name or stands twice, a label other than 0 and 1,
    and labels that are all the same.
    """
    table = _read(path, ["id", "label"])
    label = table["label"].str.strip().map({"0": 0, "1": 1, "0.0": 0, "1.0": 1})
    wrong = table.loc[label.isna()]
    if len(wrong):
        raise UserError(f"{path}: label {wrong['label'].iloc[0]!r} is neither 0 nor 1; mend the rows of {_listed(wrong['id'])}")
    if label.nunique() < 2:
        raise UserError(f"{path}: needs labels of both kinds, 0 and 1")
    return _by_id(pd.DataFrame({"id": table["id"], "label": label.astype(np.int8)}))


def read_sample(path: Path) -> pd.DataFrame:
    """Return the one column `id` (text) of the sample submission in `path`, in its own order.

    Raises UserError on a missing column and on an id that is no plain file name or stands twice.
    """
    return _read(path, ["id", "label"])[["id"]]


def read_slides(path: Path) -> pd.DataFrame:
    """Return the slide map in `path`, columns `id` and `wsi` (both text), sorted by id; raises UserError as `read_sample`."""
    table = _read(path, ["id", "wsi"])
    table = table.assign(wsi=table["wsi"].str.strip())
    empty = table.loc[table["wsi"] == ""]
    if len(empty):
        raise UserError(f"{path}: no slide is named for id {_listed(empty['id'])}; mend or drop the rows")
    return _by_id(table)


def read_numbers(path: Path, columns: list[str]) -> pd.DataFrame:
    """Return a table that the pipeline wrote: `id` as text, then `columns` as float64.

    Raises UserError where the file is missing, cut short, or holds a number that is not finite.
    """
    table = _read(path, ["id", *columns])
    try:
        numbers = table[columns].astype(np.float64)
    except ValueError as error:
        raise UserError(f"{path}: {error}; delete it and run the command again") from None
    if not np.isfinite(numbers.to_numpy()).all():
        raise UserError(f"{path}: holds a number that is not finite; delete it and run the command again")
    return pd.concat([table[["id"]], numbers], axis=1)


def check_oof(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return out-of-fold predictions (id, label, fold, probability) from `path` with label and fold as int64.

    Raises UserError on a number that is not finite and on a label that is neither 0 nor 1.
    """
    finite = np.isfinite(table[["label", "fold", "probability"]].to_numpy(np.float64)).all(axis=1)
    for wrong, which in (
        (~finite, "rows hold a number that is not finite"),
        (~table["label"].isin([0, 1]), "labels are not 0 or 1"),
    ):
        if ids := table.loc[wrong, "id"].tolist():
            raise UserError(f"{path}: {len(ids):,} {which}, of id {examples(ids)}; predict again", ids)
    return table.astype({"label": np.int64, "fold": np.int64})


def labels_sha256(labels: pd.DataFrame) -> str:
    """Return the SHA-256 of `id,label` sorted by id: the same for the same labels in any order."""
    return sha256(csv_bytes(_by_id(labels[["id", "label"]].astype({"label": np.int8}))))


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", compression=None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file ({' '.join(str(error).split())})") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(f"{path}: has no column {' or '.join(missing)}; its first line must be {','.join(columns)}")
    table = table[columns]
    if table.empty:
        raise UserError(f"{path}: holds no rows")
    odd = table.loc[~table["id"].map(lambda text: bool(PLAIN_NAME.fullmatch(text)))]
    if len(odd):
        raise UserError(f"{path}: no plain file name: id {_listed(odd['id'].map(repr))}; mend or drop the rows")
    twice = table.loc[table["id"].duplicated()]
    if len(twice):
        raise UserError(f"{path}: twice in it: id {_listed(twice['id'].drop_duplicates())}; keep one row of each")
    return table


def _by_id(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("id", kind="stable").reset_index(drop=True)


def _listed(ids: pd.Series) -> str:
    return ", ".join(ids)
