"""The worst mistakes of a run, with Grad-CAM maps of what the model looked at."""

import base64
import contextlib
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report.gallery import LABELLED_SIDE, worst_mistakes
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import net_input
from pcam_kaggle.training.learner import load_best

MISTAKES_PER_LABEL = 6
SCALE, HEAT_OPACITY, JPEG_QUALITY = 2, 0.6, 85
# On a patch of 96 px a map of 3 x 3 is too coarse to locate anything.
MIN_SIDE = 4
# What a transformer makes of patches, and its attention between them, are no maps of features.
NO_MAPS = {"patch_embed", "attn", "attn_drop"}


class Mistake(NamedTuple):
    """A misclassified patch: `patch` and `overlay`, the patch under its Grad-CAM map, are JPEGs as data URIs."""

    id: str
    label: int
    fold: int
    probability: float
    patch: str
    overlay: str


def explained_mistakes(oof: pd.DataFrame, fields: dict[str, Any], run: Run, store: PatchStore) -> list[Mistake]:
    """Return the 6 lowest-scored patches with tumour of `oof`, then the 6 highest-scored without, worst first.

    The map of a patch comes from the model of its own fold, without TTA; `fields` are those of the run's config.
    """
    config, backend = Config(**fields), Backend("cpu", "fp32", "channels_last")
    chosen = worst_mistakes(oof, MISTAKES_PER_LABEL)
    patches = store.images(store.rows("train", chosen["id"].to_numpy()))
    heat = np.zeros(patches.shape[:3], np.float32)
    margin = (patches.shape[1] - config.side) // 2
    crop = slice(margin, margin + config.side)
    for fold, part in chosen.groupby("fold"):
        net = load_best(run.fold(fold), config, backend)
        inside = part.index.to_numpy()
        signs = torch.tensor([-1.0 if value < 0.5 else 1.0 for value in part["probability"]])
        heat[inside, crop, crop] = grad_cam(net, net_input(patches[inside], config, backend), signs).numpy()
    return [
        Mistake(row.id, row.label, row.fold, row.probability, _jpeg(patch), _jpeg(patch, heat_map))
        for row, patch, heat_map in zip(chosen.itertuples(), patches, heat, strict=True)
    ]


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


def _jpeg(patch: NDArray[np.uint8], heat: NDArray[np.float32] | None = None) -> str:
    """Return `patch` (96, 96, 3), enlarged, with the labelled centre marked and `heat` (96, 96) in [0, 1] over it."""
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
