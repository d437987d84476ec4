"""Which patch is validated in which fold: drawn once, written down, and refused when it no longer fits the labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from pcam_kaggle import UserError, examples
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import csv_bytes, file_sha256, read_json, reading, sha256, write_csv, write_json
from pcam_kaggle.data.csv_io import labels_sha256, read_numbers
from pcam_kaggle.data.near_duplicates import nearest_elsewhere
from pcam_kaggle.data.stain import stain_vectors
from pcam_kaggle.data.store import PatchStore

UNMAPPED = "unmapped"
STAIN_GROUPS = 50


@dataclass(frozen=True, slots=True)
class Scheme:
    """How folds are drawn; its name is the fold file's."""

    n_splits: int
    seed: int
    kind: Literal["stratified", "slides", "stain"]

    @property
    def name(self) -> str:
        """`stratified_5_42`; `slides_5_42`, `stain_5_42` where patches of one slide or of like stain share a fold."""
        return f"{self.kind}_{self.n_splits}_{self.seed}"


@dataclass(frozen=True, slots=True)
class Folds:
    """A fold file: `table` has id (text), label and fold (both int64, folds from 0), sorted by id."""

    table: pd.DataFrame
    manifest: dict[str, Any]


def draw(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None) -> pd.DataFrame:
    """Return `labels` (id, label) sorted by id with a column `fold`, and `group` where `slides` (id, wsi) are given.

    Stratified by label; with slides, no slide lies in two folds. Ids that the map lacks become one group, in one fold: they
    may share slides among themselves, so that they are never on both sides; that one of them belongs to a mapped slide of
    another fold can't be known.

    Raises UserError where they are more than one fold holds, where slides are fewer than folds, or where a fold lacks a class.
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
                f"the slide map lacks {len(lacking):,} of {len(table):,} ids, more than one of {scheme.n_splits} folds holds "
                f"({examples(lacking)}); complete it or use --set groups=none",
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
        raise UserError(
            "a fold holds one label alone, since slides are too few or too uneven; use --set n_splits=… or fold_seed=…"
        )
    return table


def stain_groups(store: PatchStore) -> pd.DataFrame:
    """Return a map like one of slides, columns id and wsi, that gives every train patch one of 50 groups of like stain.

    Groups are clusters (k-means, seed 0) of the patches' stain vectors. They stand in for slides where no map is at hand:
    a slide is stained and scanned once, so its patches are more alike than those of two slides.

    Raises UserError where there are fewer patches than groups.
    """
    ids = store.ids("train")
    if len(ids) < STAIN_GROUPS:
        raise UserError(f"groups=stain: {len(ids)} train patches are too few for {STAIN_GROUPS} groups; use groups=none")
    rows = store.rows("train", ids)
    vectors = [stain_vectors(image).ravel() for row in rows for image in store.images(row[None])]
    clusters = KMeans(STAIN_GROUPS, n_init=1, random_state=0).fit_predict(np.stack(vectors))
    return pd.DataFrame({"id": ids, "wsi": [f"stain_{cluster:02d}" for cluster in clusters]})


def look_alikes(store: PatchStore, table: pd.DataFrame) -> pd.DataFrame:
    """Return the patches that look like one of another fold of `table` (id, label, fold), each with the nearest there.

    Columns id, fold, label, other_id, other_fold, other_label, `bits` of the perceptual hash that differ, of 64, at most 3,
    and `copy`, whether all pixels are the same as those of one in another fold.
    """
    table = table[table["id"].isin(store.ids("train"))].reset_index(drop=True)
    rows = store.rows("train", table["id"].to_numpy())
    found = nearest_elsewhere(store.looks(rows), table["fold"].to_numpy())
    first, second = (table.iloc[found[:, side]][["id", "fold", "label"]].reset_index(drop=True) for side in (0, 1))
    listed = first.join(second.add_prefix("other_")).assign(bits=found[:, 2])
    pixels = pd.Series([sha256(store.images(rows[place : place + 1]).tobytes()) for place in found[:, 0]], dtype=str)
    return listed.assign(copy=listed.groupby(pixels)["fold"].transform("nunique") > 1)


def make(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None, folder: Path) -> tuple[Folds, bool]:
    """Write `<scheme>.csv` and `.json` into `folder`, or keep them; return them and whether anything was written.

    The same labels, scheme and slides give the same bytes, whatever the order of the rows; so where one of the two files is
    missing, it is made again. Raises UserError as `draw`, and where what stands belongs to other labels or slides.
    """
    file, beside = _files(scheme, folder)
    if file.exists() and beside.exists():
        return load(labels, scheme, slides, folder), False
    table = draw(labels, scheme, slides)
    manifest = _manifest(table, scheme, slides)
    if beside.exists() and read_json(beside) != manifest:
        raise UserError(f"{beside}: belongs to other labels or slides; {_again(scheme)}")
    if file.exists() and file_sha256(file) != manifest["csv_sha256"]:
        raise UserError(f"{file}: belongs to other labels or slides; {_again(scheme)}")
    write_csv(file, table)
    write_json(beside, manifest)
    return Folds(table[["id", "label", "fold"]], manifest), True


def load(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None, folder: Path) -> Folds:
    """Return the folds of `scheme` from `folder`.

    Raises UserError where they are missing, changed since they were drawn, or belong to other labels or slides.
    """
    file, beside = _files(scheme, folder)
    if not file.exists() or not beside.exists():
        raise UserError(f"{file}: it or its manifest is missing; run `python -m pcam_kaggle folds` first")
    manifest = read_json(beside, labels_sha256=str, csv_sha256=str)
    if manifest["labels_sha256"] != labels_sha256(labels):
        raise UserError(f"{file}: belongs to other labels; {_again(scheme)}")
    if manifest.get("slides_sha256") != _slides_sha256(slides):
        raise UserError(f"{file}: belongs to another slide map; {_again(scheme)}")
    read_numbers(file, ["label", "fold"])
    table = pd.read_csv(file, dtype={"id": str, "group": str}, keep_default_na=False)
    if manifest["csv_sha256"] != file_sha256(file) or manifest != _manifest(table, scheme, slides):
        raise UserError(f"{file}: it or its manifest has changed since it was drawn; {_again(scheme)}")
    return Folds(table[["id", "label", "fold"]], manifest)


def groups(file: Path) -> pd.DataFrame | None:
    """Return the slides (id, wsi) that the fold file was drawn with, None where it knows none or is not there.

    Ids that the slide map lacked are left out: of which slides they are is not known.
    """
    table = pd.read_csv(file, dtype=str, keep_default_na=False) if file.is_file() else pd.DataFrame()
    if "group" not in table:
        return None
    return table.loc[table["group"] != UNMAPPED, ["id", "group"]].rename(columns={"group": "wsi"})


def numbers(file: Path, config: dict[str, Any]) -> range:
    """Return the folds of the run whose `config` was read from `file`; raises UserError where it tells no number of them."""
    with reading(file):
        return range(Config(n_splits=config["n_splits"]).n_splits)


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


def _again(scheme: Scheme) -> str:
    return f"delete {scheme.name}.csv and .json to draw them again, or work in another folder with --work"


def _slides_sha256(slides: pd.DataFrame | None) -> str | None:
    return sha256(csv_bytes(slides)) if slides is not None else None
