"""Groups of patches that share a fold: slides, groups of similar stain, or none."""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked, write_csv
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.data.folds import Scheme
from pcam_kaggle.data.stain import stain_vectors
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels, read_slides

STAIN_GROUPS = 50


def fold_inputs(
    data: Data, config: Config, slides: Path | None, workspace: Workspace
) -> tuple[pd.DataFrame, Scheme, pd.DataFrame | None]:
    """Return the labels, the scheme and the groups from which the folds of `config` are drawn.

    Args:
        data: The competition's files; their slide map is used by default, depending on `config.groups`.
        config: Number of folds, and `groups`.
        slides: CSV with the columns id and wsi that replaces the slide map of `data`, or None.
        workspace: Has the patch store from which stain groups are computed, and the folder in which they are cached.

    Returns:
        Labels (id, label), scheme, and groups (id, wsi) or None.

    Raises:
        UserError: `config.groups` needs a map and there is none, or contradicts `slides`.
    """
    labels, kind = read_labels(data.labels), config.groups
    if kind in ("none", "stain") and slides:
        raise UserError(f"groups={kind} and --slides contradict each other; leave one out")
    if kind == "stain":
        return labels, Scheme(config.n_splits, "stain"), _stain_map(workspace)
    path = None if kind == "none" else slides or data.slides()
    if kind == "slides" and path is None:
        raise UserError(f"groups=slides: no slide map in {data.root}; give one with --slides, or use --set groups=auto")
    scheme = Scheme(config.n_splits, "slides" if path else "stratified")
    return labels, scheme, read_slides(path) if path else None


def stain_groups(store: PatchStore) -> pd.DataFrame:
    """Cluster the train patches into 50 groups of similar stain (k-means with seed 0 on their stain vectors).

    The groups replace slides if there is no slide map: a slide is stained and scanned once, so the stains of its patches are
    more similar than those of two slides.

    Returns:
        A table like a slide map: columns id and wsi, the latter `stain_00` to `stain_49`.

    Raises:
        UserError: There are fewer patches than groups.
    """
    ids = store.ids("train")
    if len(ids) < STAIN_GROUPS:
        raise UserError(f"groups=stain: {len(ids)} train patches are too few for {STAIN_GROUPS} groups; use groups=none")
    rows = store.rows("train", ids)
    vectors = [stain_vectors(image).ravel() for row in rows for image in store.images(row[None])]
    clusters = KMeans(STAIN_GROUPS, n_init=1, random_state=0).fit_predict(np.stack(vectors))
    return pd.DataFrame({"id": ids, "wsi": [f"stain_{cluster:02d}" for cluster in clusters]})


def _stain_map(workspace: Workspace) -> pd.DataFrame:
    """Return the stain groups of the patches in the store, from a file if they were computed before."""
    store = PatchStore(workspace.store)
    file = workspace.folds / f"stain_groups_{store.manifest['train_sha256'][:12]}.csv"
    if not file.exists():
        groups = stain_groups(store)
        with locked(workspace.folds):
            write_csv(file, groups)
    return read_slides(file)
