"""The patches with the largest errors of a run, with their Grad-CAM maps."""

import base64
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from numpy.typing import NDArray

from pcam_kaggle.core.config import Config
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report.gallery import LABELLED_SIDE, largest_errors
from pcam_kaggle.report.grad_cam import grad_cam
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import net_input
from pcam_kaggle.training.fold_state import load_best

MISTAKES_PER_LABEL = 6
SCALE = 2
HEAT_OPACITY = 0.6
JPEG_QUALITY = 85


class Mistake(NamedTuple):
    """A misclassified patch: `patch` and `overlay`, the patch under its Grad-CAM map, are JPEGs as data URIs."""

    id: str
    label: int
    fold: int
    probability: float
    patch: str
    overlay: str


def most_wrong(oof: pd.DataFrame, fields: dict[str, Any], run: Run, store: PatchStore) -> list[Mistake]:
    """Return the 6 lowest-scored patches with tumour, then the 6 highest-scored without, worst first.

    The map of a patch comes from the net of its own fold, without TTA.

    Args:
        oof: Columns id, label, fold, probability.
        fields: The fields of the run's config.
        run: The run.
        store: Has the train patches.

    Raises:
        UserError: A checkpoint or a patch is missing.
    """
    config, backend = Config(**fields), Backend("cpu", "fp32", "channels_last")
    chosen = largest_errors(oof, MISTAKES_PER_LABEL)
    patches = store.images(store.rows("train", chosen["id"].to_numpy()))
    heat = np.zeros(patches.shape[:3], np.float32)
    for fold, part in chosen.groupby("fold"):
        net = load_best(run.fold(fold), config, backend)
        inside = part.index.to_numpy()
        images = net_input(patches[inside], config, backend)
        signs = torch.tensor([-1.0 if value < 0.5 else 1.0 for value in part["probability"]])
        margin = (patches.shape[1] - config.side) // 2
        crop = slice(margin, margin + config.side)
        heat[inside, crop, crop] = grad_cam(net, images, signs).numpy()
    return [
        Mistake(row.id, row.label, row.fold, row.probability, _jpeg(patch), _jpeg(patch, heat_map))
        for row, patch, heat_map in zip(chosen.itertuples(), patches, heat, strict=True)
    ]


def _jpeg(patch: NDArray[np.uint8], heat: NDArray[np.float32] | None = None) -> str:
    """Return `patch` (96, 96, 3), enlarged, with the labelled centre marked and `heat` (96, 96) in [0, 1] overlaid if given."""
    image = patch.astype(np.float32)
    if heat is not None:
        weight = HEAT_OPACITY * heat[..., None]
        image = (1 - weight) * image + weight * 255 * colormaps["viridis"](heat)[..., :3]
    side = SCALE * len(patch)
    picture = cv2.resize(image.clip(0, 255).astype(np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    start = (side - SCALE * LABELLED_SIDE) // 2
    end = start + SCALE * LABELLED_SIDE - 1
    cv2.rectangle(picture, (start, start), (end, end), (0, 0, 0), 3)
    cv2.rectangle(picture, (start, start), (end, end), (255, 255, 255), 1)
    _, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
