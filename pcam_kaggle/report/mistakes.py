"""The patches that a run is most wrong about, and what its nets looked at in them."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from numpy.typing import NDArray

from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report.grad_cam import grad_cam
from pcam_kaggle.training.augment import centre
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.train import load_best

LABELLED_SIDE = 32
WRONG_PER_LABEL = 6
ENLARGED = 2
HEAT = 0.6
JPEG_QUALITY = 85


class Mistake(NamedTuple):
    """A patch, as it is and under what the net looked at: JPEGs as data URIs."""

    id: str
    label: int
    fold: int
    probability: float
    patch: str
    overlay: str


def most_wrong(oof: pd.DataFrame, fields: dict[str, Any], run: Path, store: PatchStore) -> list[Mistake]:
    """Return the 6 patches with tumour that `oof` scores lowest, then the 6 without that it scores highest, worst first.

    `oof` has id, label, fold, probability; `fields` are those of the config that the nets in folder `run` were trained with.
    The map of each is of the plain patch under its own fold's net. Raises UserError where a checkpoint or a patch is missing.
    """
    config, backend = Config(**fields), Backend("cpu", "fp32", "channels_last")
    by_score = oof.sort_values(["probability", "id"])
    missed = by_score[by_score["label"] == 1].head(WRONG_PER_LABEL)
    raised = by_score[by_score["label"] == 0].tail(WRONG_PER_LABEL)[::-1]
    chosen = pd.concat([missed, raised], ignore_index=True)
    patches = store.images(store.rows("train", chosen["id"].to_numpy()))
    heat = np.zeros(patches.shape[:3], np.float32)
    for fold, part in chosen.groupby("fold"):
        net = load_best(run / f"fold_{fold}", config, backend)
        inside = part.index.to_numpy()
        images = backend.images(torch.from_numpy(centre(patches[inside], config.side)))
        signs = torch.tensor([-1.0 if value < 0.5 else 1.0 for value in part["probability"]])
        margin = (patches.shape[1] - config.side) // 2
        seen = slice(margin, margin + config.side)
        heat[inside, seen, seen] = grad_cam(net, images, signs).numpy()
    return [
        Mistake(row.id, row.label, row.fold, row.probability, _jpeg(patch), _jpeg(patch, warmth))
        for row, patch, warmth in zip(chosen.itertuples(), patches, heat, strict=True)
    ]


def _jpeg(patch: NDArray[np.uint8], heat: NDArray[np.float32] | None = None) -> str:
    """Return `patch` (96, 96, 3), under `heat` (96, 96) in [0, 1] if given, enlarged and with its centre square drawn in."""
    image = patch.astype(np.float32)
    if heat is not None:
        weight = HEAT * heat[..., None]
        image = (1 - weight) * image + weight * 255 * colormaps["viridis"](heat)[..., :3]
    side = ENLARGED * len(patch)
    picture = cv2.resize(image.clip(0, 255).astype(np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    start = (side - ENLARGED * LABELLED_SIDE) // 2
    end = start + ENLARGED * LABELLED_SIDE - 1
    cv2.rectangle(picture, (start, start), (end, end), (0, 0, 0), 3)
    cv2.rectangle(picture, (start, start), (end, end), (255, 255, 255), 1)
    _, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
