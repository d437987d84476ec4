"""Cross-validation folds: drawn once, written to a file, and rejected if they no longer belong to the labels."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples, program
from pcam_kaggle.core.files import csv_bytes, file_sha256, locked, sha256, write_csv
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.core.records import Record
from pcam_kaggle.data.stain import stain_vectors
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import draw_subset, labels_sha256, read_labels, read_numbers, read_slides, read_text

UNMAPPED = "unmapped"
STAIN_GROUPS = 50


@dataclass(frozen=True, slots=True)
class Scheme:
    """How folds are drawn, of `subset` train patches, 0 for all; `given` is the table of those that were drawn elsewhere."""

    n_splits: int
    kind: Literal["stratified", "slides", "stain", "given", "grouped"]
    seed: int | None = 42
    subset: int = 0
    given: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False)

    @property
    def name(self) -> str:
        """Stem of the fold file, for example `slides_5_42`, `slides_5_42_subset5000` or, by its content, `given_0a1b2c3d`."""
        drawn = f"{self.n_splits}_{self.seed}" if self.given.empty else sha256(csv_bytes(self.given))[:8]
        return f"{self.kind}_{drawn}" + (f"_subset{self.subset}" if self.subset else "")


class FoldsManifest(Record):
    """The manifest of a fold file; `patches`, `positives` and `slides` are counts per fold."""

    scheme: str
    n_splits: int
    seed: int | None
    patches: list[int]
    positives: list[int]
    slides: list[int] | None
    unmapped: int | None
    labels_sha256: str
    slides_sha256: str | None
    csv_sha256: str


@dataclass(frozen=True, slots=True)
class Folds:
    """A fold file, as the columns id (text), label (int64, 0 or 1) and fold (int64, from 0), sorted by id; and its manifest."""

    table: pd.DataFrame
    manifest: FoldsManifest


def fold_inputs(
    data: Data, config: Config, slides: Path | None, workspace: Workspace, fold_file: Path | None = None
) -> tuple[pd.DataFrame, Scheme, pd.DataFrame | None]:
    """Return the labels (id, label), the scheme and the groups (id, wsi), or None, from which the folds of `config` are drawn.

    The CSV `slides` (id, wsi) replaces the slide map of `data`. Groups of similar stain are computed once from the patch store.
    Nothing is drawn if there is a `fold_file` (see `given_folds`).
    """
    labels, kind = draw_subset(read_labels(data.labels), config.subset), config.groups
    if fold_file and (slides or kind != "auto"):
        raise UserError(f"--fold-file {fold_file}: has its own groups, so it can't be combined with --slides or groups={kind}")
    if fold_file:
        return labels, *given_folds(fold_file, read_labels(data.labels), config.subset)
    if kind in ("none", "stain") and slides:
        raise UserError(f"groups={kind} and --slides contradict each other; leave one out")
    if kind == "stain":
        groups = stain_map(PatchStore(workspace.store_of(config.subset)), workspace.folds)
        return labels, Scheme(config.n_splits, "stain", subset=config.subset), groups
    path = None if kind == "none" else slides or data.slides()
    if kind == "slides" and path is None:
        raise UserError(f"groups=slides: no slide map in {data.root}; give one with --slides, or use --set groups=auto")
    scheme = Scheme(config.n_splits, "slides" if path else "stratified", subset=config.subset)
    return labels, scheme, read_slides(path) if path else None


def given_folds(file: Path, labels: pd.DataFrame, subset: int = 0) -> tuple[Scheme, pd.DataFrame | None]:
    """Return the scheme of the folds in the CSV `file` (id, fold and perhaps group), and its groups (id, wsi) or None.

    Of `labels` (id, label; sorted by id) a `subset` is used. UserError if ids differ, a fold lacks a label or a group is split.
    """
    table, groups = read_numbers(file, ["fold"]), read_groups(file)
    if others := sorted({*table["id"]} ^ {*labels["id"]}):
        raise UserError(f"{file}: {len(others):,} ids lack a label or a row here ({examples(others)}); fix the rows", others)
    count = max(2, table["fold"].nunique())
    table = labels.merge(table).astype({"label": np.int64})
    if groups is not None:
        table["group"] = table["id"].map(groups.set_index("id")["wsi"]).fillna(UNMAPPED)
        folds = table.groupby("group")["fold"].nunique()
        if (folds > 1).any():
            raise UserError(f"{file}: group {folds.idxmax()} is in several folds; leave out the column group if it may be")
    table = table[table["id"].isin(draw_subset(labels, subset)["id"])].reset_index(drop=True)
    kinds = table.groupby("fold")["label"].nunique().reindex(range(count), fill_value=0)
    if (kinds < 2).any():
        needs = f"each needs both, also in subset={subset}; choose a larger one" if subset else "each needs both"
        raise UserError(f"{file}: fold {kinds.idxmin()} of 0 to {count - 1} is missing or lacks a label; {needs}")
    return Scheme(count, "given" if groups is None else "grouped", None, subset, table.astype({"fold": np.int64})), groups


def find_folds(table: pd.DataFrame, folder: Path) -> FoldsManifest | None:
    """Return the manifest of the fold file in `folder` with the id, label and fold of `table`, if any, whatever its scheme."""
    columns = ["id", "label", "fold"]
    wanted = table.reindex(columns=columns).astype(str)
    # Folds that were drawn come before given ones, which may lack the groups.
    for file in sorted(folder.glob("*.csv"), reverse=True):
        manifest = file.with_suffix(".json")
        # A damaged file, which lacks a column, is not equal.
        if manifest.is_file() and read_text(file).reindex(columns=columns).equals(wanted):
            return FoldsManifest.read(manifest)
    return None


def stain_groups(store: PatchStore) -> pd.DataFrame:
    """Cluster the train patches into 50 groups of similar stain (k-means with seed 0 on their stain vectors).

    The groups replace slides if there is no slide map: a slide is stained and scanned once, so the stains of its patches are
    more similar than those of two slides. Returned like a slide map: columns id and wsi, the latter `stain_00` to `stain_49`.
    """
    ids = store.ids("train")
    if len(ids) < STAIN_GROUPS:
        raise UserError(f"groups=stain: {len(ids)} train patches are too few for {STAIN_GROUPS} groups; use groups=none")
    rows = store.rows("train", ids)
    vectors = [stain_vectors(image).ravel() for row in rows for image in store.images(row[None])]
    clusters = KMeans(STAIN_GROUPS, n_init=1, random_state=0).fit_predict(np.stack(vectors))
    return pd.DataFrame({"id": ids, "wsi": [f"stain_{cluster:02d}" for cluster in clusters]})


def stain_map(store: PatchStore, folder: Path) -> pd.DataFrame:
    """Return the `stain_groups` of `store`, which are computed once and written to `folder`."""
    file = folder / f"stain_groups_{store.manifest.train_sha256[:12]}.csv"
    if not file.exists():
        groups = stain_groups(store)
        with locked(folder):
            write_csv(file, groups)
    return read_slides(file)


def draw_folds(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None) -> pd.DataFrame:
    """Draw folds that are stratified by label; with `slides` (id, wsi), all patches of a slide are in one fold.

    Ids that the slide map lacks form one group in one fold, since they may share slides with each other. They may also share a
    slide with mapped patches of another fold, which cannot be known. Returns `labels` (id, label) sorted by id with the columns
    `fold` and, with `slides`, `group`.
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


def make_folds(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None, folder: Path) -> tuple[Folds, bool]:
    """Write `<scheme>.csv` and its manifest `<scheme>.json` into `folder`, or load them if they exist.

    The same labels, scheme and slides give the same bytes, independent of the order of rows. One of the two files alone is
    replaced. Returns the folds, and whether anything was written.
    """
    file = folder / f"{scheme.name}.csv"
    if file.exists() and file.with_suffix(".json").exists():
        return load_folds(labels, scheme, slides, folder), False
    table = draw_folds(labels, scheme, slides) if scheme.given.empty else scheme.given
    manifest = _manifest(table, scheme, slides)
    write_csv(file, table)
    manifest.write(file.with_suffix(".json"))
    return Folds(table[["id", "label", "fold"]], manifest), True


def load_folds(labels: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None, folder: Path) -> Folds:
    """Return the folds of `scheme` from `folder`, unless they have changed or belong to other labels or slides."""
    file = folder / f"{scheme.name}.csv"
    manifest_file = file.with_suffix(".json")
    if not file.exists() or not manifest_file.exists():
        raise UserError(f"{file}: it or its manifest is missing; run `{program()} folds` first")
    advice = f"delete {scheme.name}.csv and .json to draw the folds again, or use another folder with --work"
    manifest = FoldsManifest.read(manifest_file)
    if manifest.labels_sha256 != labels_sha256(labels):
        raise UserError(f"{file}: belongs to other labels; {advice}")
    if manifest.slides_sha256 != _slides_sha256(slides):
        raise UserError(f"{file}: belongs to another slide map; {advice}")
    if manifest.csv_sha256 == file_sha256(file):
        table = read_text(file).astype({"label": np.int64, "fold": np.int64})
        if manifest == _manifest(table, scheme, slides):
            return Folds(table[["id", "label", "fold"]], manifest)
    raise UserError(f"{file}: it or its manifest has changed since it was drawn; {advice}")


def read_groups(file: Path) -> pd.DataFrame | None:
    """Return the mapped slides (id, wsi) that the fold file was drawn with; None if it has no slides or does not exist."""
    table = read_text(file) if file.is_file() else pd.DataFrame()
    if "group" not in table:
        return None
    return table.loc[~table["group"].isin(["", UNMAPPED]), ["id", "group"]].rename(columns={"group": "wsi"}).sort_values("id")


def _manifest(table: pd.DataFrame, scheme: Scheme, slides: pd.DataFrame | None) -> FoldsManifest:
    per_fold = table.groupby("fold")["label"].agg(["size", "sum"])
    return FoldsManifest(
        scheme=scheme.name,
        n_splits=scheme.n_splits,
        seed=scheme.seed,
        patches=per_fold["size"].tolist(),
        positives=per_fold["sum"].tolist(),
        slides=table.groupby("fold")["group"].nunique().tolist() if slides is not None else None,
        unmapped=int((table["group"] == UNMAPPED).sum()) if slides is not None else None,
        labels_sha256=labels_sha256(table),
        slides_sha256=_slides_sha256(slides),
        csv_sha256=sha256(csv_bytes(table)),
    )


def _slides_sha256(slides: pd.DataFrame | None) -> str | None:
    return sha256(csv_bytes(slides)) if slides is not None else None
