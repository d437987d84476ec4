"""Pictures of mistakes: the worst ones, and labels that every run contradicts."""

import base64
from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray

from pcam_kaggle.report.gallery import LABELLED_SIDE, Images

CERTAIN = 0.9
SIDE, HEAT_OPACITY, JPEG_QUALITY = 180, 0.6, 85


class Tile(NamedTuple):
    """Pictures of a patch beside each other, `side` px each: JPEGs as data URIs with their text alternatives."""

    pictures: list[tuple[str, str]]
    caption: str
    side: int = SIDE


def suspect_labels(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return patches with an OOF probability below 0.1 though labelled 1, or above 0.9 though labelled 0, in every run.

    `tables` are the OOF tables (id, label, probability) by run. A run that lacks a patch does not count for it, but two runs
    must have it if there are two. Returned are id, label and `probability_<run>`, NaN where lacking; largest mean error first.
    """
    columns = [oof.set_index(["id", "label"])["probability"].rename(f"probability_{name}") for name, oof in tables.items()]
    joined = pd.concat(columns, axis=1).sort_index()
    errors = joined.sub(joined.index.get_level_values("label"), axis=0).abs()
    is_suspect = (errors.isna() | (errors > CERTAIN)).all(axis=1) & (errors.count(axis=1) >= min(2, len(columns)))
    extreme_first = errors[is_suspect].mean(axis=1).sort_values(ascending=False, kind="stable").index
    return joined.loc[extreme_first].reset_index()


def mistake_tiles(mistakes: pd.DataFrame, patches: Images, maps: NDArray[np.float32] | None) -> dict[str, list[Tile]]:
    """Return the patch of each of `mistakes` (id, label, fold, probability) and, of `maps`, its map; keys are headings."""
    tiles: dict[str, list[Tile]] = {}
    for index, row in enumerate(mistakes.itertuples()):
        value, tissue = f"probability {row.probability:.4f}", "with" if row.label else "without"
        pictures = [(jpeg(patches[index]), f"Patch {row.id} {tissue} tumour, {value}; a square marks its centre")]
        if maps is not None:
            pictures.append((jpeg(patches[index], heat=maps[index]), "Grad-CAM map of the same patch"))
        tile = Tile(pictures, f"{row.id[:16]}, fold {row.fold}: {value}")
        tiles.setdefault("False negatives" if row.label else "False positives", []).append(tile)
    return tiles


def jpeg(patch: NDArray[np.uint8], side: int = SIDE, marked: bool = True, heat: NDArray[np.float32] | None = None) -> str:
    """Return the RGB `patch` as a data URI of `side` px, under `heat` (96, 96) in [0, 1], with its labelled centre `marked`."""
    image = patch.astype(np.float32)
    if heat is not None:
        weight = HEAT_OPACITY * heat[..., None]
        image = (1 - weight) * image + weight * 255 * colormaps["viridis"](heat)[..., :3]
    picture = cv2.resize(image.clip(0, 255).astype(np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    centre = side * LABELLED_SIDE // len(patch)
    start, end = (side - centre) // 2, (side + centre) // 2 - 1
    for grey, width in ((0, 3), (255, 1)) if marked else ():
        cv2.rectangle(picture, (start, start), (end, end), (grey,) * 3, width)
    _, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
