"""Cross-validation folds: drawn once, written to a file, and rejected if they no longer belong to the labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import csv_bytes, file_sha256, read_json, sha256, write_csv, write_json
from pcam_kaggle.data.tables import labels_sha256, read_numbers

UNMAPPED = "unmapped"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How folds are drawn."""

    n_splits: int
    kind: Literal["stratified", "slides", "stain"]
    seed: int = 42

    @property
    def name(self) -> str:
        """Stem of the fold file, for example `stratified_5_42`, `slides_5_42` or `stain_5_42`."""
        return f"{self.kind}_{self.n_splits}_{self.seed}"


@dataclass(frozen=True, slots=True)
class Folds:
    """A fold file and its manifest.

    Attributes:
        table: Columns id (text), label (int64, 0 or 1) and fold (int64, from 0), sorted by id.
        manifest: Scheme, counts per fold, and the hashes of labels, slide map and fold file.
    """

    table: pd.DataFrame
    manifest: dict[str, Any]


def draw(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None) -> pd.DataFrame:
    """Draw folds that are stratified by label; with `slides`, all patches of a slide are in one fold.

    Ids that the slide map lacks form one group in one fold, since they may share slides with each other. They may also share a
    slide with mapped patches of another fold, which cannot be known.

    Args:
        labels: Columns id and label.
        scheme: Number of folds and seed.
        slides: Columns id and wsi, or None.

    Returns:
        `labels` sorted by id with the columns `fold` and, with `slides`, `group`.

    Raises:
        UserError: The slide map lacks more ids than fit into a fold, slides are fewer than folds, or a fold has one label only.
    """
    table = labels.sort_values("id").reset_index(drop=True)
    if slides is None:
        splitter = StratifiedKFold(scheme.n_splits, shuffle=True, random_state=scheme.seed)
        groups = None
    else:
        groups = table["id"].map(slides.set_index("id")["wsi"]).fillna(UNMAPPED)
        lacking = table.loc[groups == UNMAPPED, "id"].tolist()
        if len(lacking) * scheme.n_splits > len(table):
            raise UserError(
                f"the slide map lacks {len(lacking):,} of {len(table):,} ids, more than fit into one of {scheme.n_splits} "
                f"folds ({examples(lacking)}); complete it or use --set groups=none",
                lacking,
            )
        if groups.nunique() < scheme.n_splits:
            raise UserError(f"{groups.nunique()} slides can't fill {scheme.n_splits} folds; use --set n_splits=…")
        splitter = StratifiedGroupKFold(scheme.n_splits, shuffle=True, random_state=scheme.seed)
        table["group"] = groups
    if table["label"].value_counts().min() < scheme.n_splits:
        raise UserError(f"fewer patches of one label than {scheme.n_splits} folds; use --set n_splits=…")
    fold = np.empty(len(table), np.int64)
    for number, (_, valid) in enumerate(splitter.split(table["id"], table["label"], groups)):
        fold[valid] = number
    table.insert(2, "fold", fold)
    if (table.groupby("fold")["label"].nunique() < 2).any() or table["fold"].nunique() < scheme.n_splits:
        raise UserError("a fold has only one label, since slides are too few or too uneven; use --set n_splits=…")
    return table


def make(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None, folder: Path) -> tuple[Folds, bool]:
    """Write `<scheme>.csv` and its manifest `<scheme>.json` into `folder`, or load them if they exist.

    The same labels, scheme and slides give the same bytes, independent of the order of rows. If only one of the two files
    exists, the other one is written again.

    Returns:
        The folds, and whether anything was written.

    Raises:
        UserError: As `draw` and `load`; or an existing file belongs to other labels or slides.
    """
    file, manifest_file = _files(scheme, folder)
    if file.exists() and manifest_file.exists():
        return load(labels, scheme, slides, folder), False
    table = draw(labels, scheme, slides)
    manifest = _manifest(table, scheme, slides)
    if manifest_file.exists() and read_json(manifest_file) != manifest:
        raise UserError(f"{manifest_file}: belongs to other labels or slides; {_advice(scheme)}")
    if file.exists() and file_sha256(file) != manifest["csv_sha256"]:
        raise UserError(f"{file}: belongs to other labels or slides; {_advice(scheme)}")
    write_csv(file, table)
    write_json(manifest_file, manifest)
    return Folds(table[["id", "label", "fold"]], manifest), True


def load(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None, folder: Path) -> Folds:
    """Return the folds of `scheme` from `folder`.

    Raises:
        UserError: They are missing, changed since they were drawn, or belong to other labels or slides.
    """
    file, manifest_file = _files(scheme, folder)
    if not file.exists() or not manifest_file.exists():
        raise UserError(f"{file}: it or its manifest is missing; run `python -m pcam_kaggle folds` first")
    manifest = read_json(manifest_file, labels_sha256=str, csv_sha256=str)
    if manifest["labels_sha256"] != labels_sha256(labels):
        raise UserError(f"{file}: belongs to other labels; {_advice(scheme)}")
    if manifest.get("slides_sha256") != _slides_sha256(slides):
        raise UserError(f"{file}: belongs to another slide map; {_advice(scheme)}")
    read_numbers(file, ["label", "fold"])
    table = pd.read_csv(file, dtype={"id": str, "group": str}, keep_default_na=False)
    if manifest["csv_sha256"] != file_sha256(file) or manifest != _manifest(table, scheme, slides):
        raise UserError(f"{file}: it or its manifest has changed since it was drawn; {_advice(scheme)}")
    return Folds(table[["id", "label", "fold"]], manifest)


def groups(file: Path) -> pd.DataFrame | None:
    """Return the slides (id, wsi) that the fold file was drawn with; None if it has no slides or does not exist.

    Ids that the slide map lacked are left out.
    """
    table = pd.read_csv(file, dtype=str, keep_default_na=False) if file.is_file() else pd.DataFrame()
    if "group" not in table:
        return None
    return table.loc[table["group"] != UNMAPPED, ["id", "group"]].rename(columns={"group": "wsi"})


def _manifest(table: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None) -> dict[str, Any]:
    per_fold = table.groupby("fold")["label"].agg(["size", "sum"])
    return {
        "scheme": scheme.name,
        "n_splits": scheme.n_splits,
        "seed": scheme.seed,
        "patches": per_fold["size"].tolist(),
        "positives": per_fold["sum"].tolist(),
        "slides": table.groupby("fold")["group"].nunique().tolist() if slides is not None else None,
        "unmapped": int((table["group"] == UNMAPPED).sum()) if slides is not None else None,
        "labels_sha256": labels_sha256(table),
        "slides_sha256": _slides_sha256(slides),
        "csv_sha256": sha256(csv_bytes(table)),
    }


def _files(scheme: Scheme, folder: Path) -> tuple[Path, Path]:
    return folder / f"{scheme.name}.csv", folder / f"{scheme.name}.json"


def _advice(scheme: Scheme) -> str:
    return f"delete {scheme.name}.csv and .json to draw the folds again, or use another folder with --work"


def _slides_sha256(slides: pd.DataFrame | None) -> str | None:
    return sha256(csv_bytes(slides)) if slides is not None else None
