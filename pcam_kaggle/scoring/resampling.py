"""What tests of significance count as independent observations: patches, or the groups that the folds keep together."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle import UserError
from pcam_kaggle.data.csv_io import read_numbers, read_slides
from pcam_kaggle.data.folds import groups
from pcam_kaggle.scoring.metrics import Unit

UNITS: dict[str, Unit] = {"stratified": "patch", "slides": "slide", "stain": "stain group"}


def unit_of(scheme: str) -> Unit:
    """Return the unit of runs on the folds called `scheme`, as `slides_5_42`; raises UserError where that is no fold scheme."""
    kind = scheme.partition("_")[0]
    if kind not in UNITS:
        raise UserError(f"{scheme!r} is not a fold scheme; its name must begin with {', '.join(UNITS)}")
    return UNITS[kind]


def resampling(scheme: str, oof: pd.DataFrame, folder: Path, slides: Path | None) -> tuple[pd.DataFrame | None, Unit]:
    """Return the groups (id, wsi) to resample for `oof` (id, fold), None for the patches themselves, and what they are called.

    They are the slides of the map `slides` where it is given, else what `scheme` keeps together, from its file in `folder`.
    Raises UserError where that file is missing or has other folds than `oof`, and where the map names none of its patches.
    """
    if slides:
        found = read_slides(slides)
        if not oof["id"].isin(found["id"]).any():
            raise UserError(f"--slides {slides}: names none of the {len(oof):,} patches; give the map of this data set")
        return found, "slide"
    unit, file = unit_of(scheme), folder / f"{scheme}.csv"
    if unit == "patch":
        return None, unit
    needed = f"intervals and tests need the {unit}s in it; restore it, or give a slide map with --slides"
    if not file.is_file():
        raise UserError(f"{file}: missing; {needed}")
    drawn, table = read_numbers(file, ["fold"]).set_index("id")["fold"], groups(file)
    if table is None or not np.array_equal(drawn.reindex(oof["id"]), oof["fold"]):
        raise UserError(f"{file}: not the folds of these runs; {needed}")
    return table, unit


def clusters(ids: pd.Series, slides: pd.DataFrame | None, scheme: str) -> NDArray[np.int64] | None:
    """Return the codes (n,), from 0, of the groups that `slides` (id, wsi) give `ids`, None where it is None.

    A patch that the map lacks is a group of its own. Raises ValueError where `scheme` has groups and none are given.
    """
    if slides is None:
        if unit_of(scheme) != "patch":
            raise ValueError(f"folds {scheme}: patches of one {unit_of(scheme)} are not independent, so its groups are needed")
        return None
    return pd.factorize(ids.map(slides.set_index("id")["wsi"]).fillna(ids))[0]
