"""Mistakes: the worst ones with Grad-CAM maps of what the models looked at, and labels that every run contradicts."""

import base64
import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.report.gallery import LABELLED_SIDE, Images
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.held_out import Ensemble
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import net_input
from pcam_kaggle.training.learner import load_best

BACKEND = Backend("cpu", "fp32", "channels_last")
CERTAIN = 0.9
# Three pairs of this side fit beside each other.
SIDE, HEAT_OPACITY, JPEG_QUALITY = 180, 0.6, 85
# On a patch of 96 px a map of 3 x 3 is too coarse to locate anything.
MIN_SIDE = 4
# What a transformer makes of patches, and its attention between them, are no maps of features.
NO_MAPS = {"patch_embed", "attn", "attn_drop"}

Maps = NDArray[np.float32]


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


def mistake_tiles(mistakes: pd.DataFrame, patches: Images, maps: Maps | None) -> dict[str, list[Tile]]:
    """Return the patch of each of `mistakes` (id, label, fold, probability) and, of `maps`, its map; keys are headings."""
    tiles: dict[str, list[Tile]] = {"False negatives": [], "False positives": []}
    for index, row in enumerate(mistakes.itertuples()):
        value, tissue = f"probability {row.probability:.4f}", "with" if row.label else "without"
        pictures = [(jpeg(patches[index]), f"Patch {row.id} {tissue} tumour, {value}; a square marks its centre")]
        if maps is not None:
            pictures.append((jpeg(_overlay(patches[index], maps[index])), "Grad-CAM map of the same patch"))
        heading = "False negatives" if row.label else "False positives"
        tiles[heading].append(Tile(pictures, f"{row.id[:16]}, fold {row.fold}: {value}"))
    return tiles


def ensemble_maps(
    chosen: pd.DataFrame, patches: Images, ensemble: Ensemble, workspace: Workspace
) -> tuple[Maps | None, list[str]]:
    """Return the weighted mean (n, 96, 96) of the members' Grad-CAM maps, and the reasons why members are left out.

    The maps explain the predictions of `chosen` (fold, probability), whose patches are `patches` (n, 96, 96, 3). The mean is
    None if no member has maps.
    """
    maps, weights, left_out = [], [], []
    for name, weight in ensemble.weights.items():
        if weight:
            try:
                maps.append(_member_maps(chosen, patches, Run(workspace.run(name))))
                weights.append(weight)
            except (UserError, OSError, RuntimeError) as error:
                # A missing checkpoint, or a model without feature maps, must not prevent the rest of the report.
                left_out.append(f"{name} ({' '.join(str(error).split())[:200]})")
    return np.average(maps, axis=0, weights=weights) if maps else None, left_out


def _member_maps(chosen: pd.DataFrame, patches: Images, run: Run) -> Maps:
    """Return the maps of each patch by the model of its own fold, without TTA."""
    config = run.config()
    maps = np.zeros(patches.shape[:3], np.float32)
    margin = (patches.shape[1] - config.side) // 2
    crop = slice(margin, margin + config.side)
    for fold in chosen["fold"].unique():
        net = load_best(run.fold(fold), config, BACKEND)
        inside = np.flatnonzero(chosen["fold"] == fold)
        signs = torch.tensor([-1.0 if value < 0.5 else 1.0 for value in chosen["probability"].iloc[inside]])
        maps[inside, crop, crop] = grad_cam(net, net_input(patches[inside], config, BACKEND), signs).numpy()
    return maps


def grad_cam(net: nn.Module, images: Tensor, signs: Tensor) -> Tensor:
    """Return gradient-weighted class activation maps (Selvaraju et al. 2017, equations 1 and 2), float32 (n, h, w) in [0, 1].

    `images` are (n, 3, h, w), and `signs` (n,) are 1 to explain the class tumour, -1 to explain the class no tumour. Each map
    is divided by its maximum unless it is zero everywhere.
    """
    module = feature_module(net, images[:1])
    features: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        features.append(output.detach().requires_grad_())
        # A copy, since the next layer may be in-place.
        return features[-1].clone()

    with torch.enable_grad(), module.register_forward_hook(record):
        logits = net(images)
        (gradient,) = torch.autograd.grad((logits * signs).sum(), features[-1])
    maps = (gradient.mean((2, 3), keepdim=True) * features[-1].detach()).sum(1, keepdim=True).relu().float()
    maps = nn.functional.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def feature_module(net: nn.Module, images: Tensor) -> nn.Module:
    """Return the last module of `net` whose output is a square map of at least 4 x 4 positions, or else of at least 2 x 2."""
    outputs: list[tuple[int, nn.Module]] = []

    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        # The patch is square, and so are its maps; transformers also return tensors with the channels last.
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3]:
            outputs.append((output.shape[2], module))

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in net.named_modules():
            if name and not NO_MAPS & set(name.split(".")):
                hooks.enter_context(module.register_forward_hook(record))
        net(images)
    for minimum in (MIN_SIDE, 2):
        if candidates := [module for side, module in outputs if side >= minimum]:
            return candidates[-1]
    raise UserError("no module of the model returns a map of more than one position")


def _overlay(patch: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return `patch` (96, 96, 3) under `heat` (96, 96) in [0, 1]."""
    weight = HEAT_OPACITY * heat[..., None]
    image = (1 - weight) * patch + weight * 255 * colormaps["viridis"](heat)[..., :3]
    return image.clip(0, 255).astype(np.uint8)


def jpeg(patch: NDArray[np.uint8], side: int = SIDE, marked: bool = True) -> str:
    """Return the RGB `patch` resized to `side` px as a data URI; if `marked`, with the labelled centre of its 96 px framed."""
    picture = cv2.resize(patch, (side, side), interpolation=cv2.INTER_CUBIC)
    centre = side * LABELLED_SIDE // len(patch)
    start = (side - centre) // 2
    end = start + centre - 1
    for grey, width in ((0, 3), (255, 1)) if marked else ():
        cv2.rectangle(picture, (start, start), (end, end), (grey,) * 3, width)
    _, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
