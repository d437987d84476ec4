"""The unit that intervals and tests resample: patches, or the groups of patches that the folds keep together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.data.folds import read_groups
from pcam_kaggle.data.tables import read_numbers, read_slides
from pcam_kaggle.scoring.bootstrap import Codes, bootstrap_interval, bootstrap_test
from pcam_kaggle.scoring.delong import delong_difference, delong_interval
from pcam_kaggle.scoring.metrics import Difference, Estimate, Floats, Labels, Unit

UNITS: dict[str, Unit] = {"stratified": "patch", "slides": "slide", "stain": "stain group"}


def unit_of(scheme: str) -> Unit:
    """Return the unit of the fold scheme `scheme`, such as `slides_5_42`.

    Raises:
        UserError: It is not a fold scheme.
    """
    kind = scheme.partition("_")[0]
    if kind not in UNITS:
        raise UserError(f"{scheme!r} is not a fold scheme; its name must begin with {', '.join(UNITS)}")
    return UNITS[kind]


def resampling(scheme: str, oof: pd.DataFrame, folder: Path, slides: Path | None) -> tuple[pd.DataFrame | None, Unit]:
    """Return the groups to resample for the patches of `oof`, and what a group is called.

    Args:
        scheme: The fold scheme of `oof`. It defines the groups unless `slides` is given.
        oof: Columns id, fold.
        folder: The folder of the fold files.
        slides: A slide map (id, wsi), which replaces the groups of the fold file.

    Returns:
        A table of id, wsi, or None to resample patches; and the unit.

    Raises:
        UserError: The fold file is missing or has other folds than `oof`, or the map has none of the patches.
    """
    if slides:
        found = read_slides(slides)
        if not oof["id"].isin(found["id"]).any():
            raise UserError(f"--slides {slides}: has none of the {len(oof):,} patches; pass the slide map of this data set")
        return found, "slide"
    unit, file = unit_of(scheme), folder / f"{scheme}.csv"
    if unit == "patch":
        return None, unit
    needed = f"intervals and tests need its {unit}s; restore it, or pass a slide map with --slides"
    if not file.is_file():
        raise UserError(f"{file}: missing; {needed}")
    folds, table = read_numbers(file, ["fold"]).set_index("id")["fold"], read_groups(file)
    if table is None or not np.array_equal(folds.reindex(oof["id"]), oof["fold"]):
        raise UserError(f"{file}: not the folds of these runs; {needed}")
    return table, unit


def cluster_codes(ids: pd.Series, table: pd.DataFrame | None, scheme: str) -> NDArray[np.int64] | None:
    """Return the codes (n,), from 0, of the groups of `ids` in `table` (id, wsi), or None where `table` is None.

    A patch that `table` lacks is a group of its own.

    Raises:
        ValueError: `scheme` has groups and `table` is None.
    """
    if table is None:
        if unit_of(scheme) != "patch":
            raise ValueError(f"folds {scheme}: patches of one {unit_of(scheme)} are not independent; pass its groups")
        return None
    return pd.factorize(ids.map(table.set_index("id")["wsi"]).fillna(ids))[0]


def interval(labels: Labels, scores: Floats, clusters: Codes | None, unit: Unit = "slide") -> Estimate:
    """Return the AUC of `scores` (n,) with its 95 % interval: bootstrap over `clusters` (n,), DeLong's where they are None."""
    if clusters is None:
        return delong_interval(labels, scores)
    return bootstrap_interval(labels, clusters, scores, unit=unit)


def paired_test(
    labels: Labels, baseline: Floats, clusters: Codes | None, unit: Unit = "slide"
) -> Callable[[Floats], Difference]:
    """Return the function that tests AUC(scores) - AUC(baseline), both (n,) on the same patches.

    By bootstrap over `clusters` (n,), any integer codes; by DeLong's test over patches where they are None.
    """
    if clusters is None:
        return lambda scores: delong_difference(labels, scores, baseline)
    return bootstrap_test(labels, clusters, baseline, unit)
