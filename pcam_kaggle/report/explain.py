"""What the models of a run look at: Grad-CAM maps, and their features in two dimensions."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report.gallery import Images
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.held_out import Ensemble
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import PREDICT_BATCH, adapt_norms, net_input
from pcam_kaggle.training.learner import load_best

BACKEND = Backend("cpu", "fp32", "channels_last")
# On a patch of 96 px a map of 3 x 3 is too coarse to locate anything.
MIN_SIDE = 4
# What a transformer makes of patches, and its attention between them, are no maps of features.
NO_MAPS = {"patch_embed", "attn", "attn_drop"}
# A point takes 100 bytes of the page. Of large models there are fewer, to bound the multiply-accumulate operations.
MIN_POINTS, MAX_POINTS, MAX_MACS = 200, 1000, 4e11


def ensemble_maps(
    chosen: pd.DataFrame, patches: Images, ensemble: Ensemble, workspace: Workspace
) -> tuple[NDArray[np.float32] | None, list[str]]:
    """Return the weighted mean (n, 96, 96) of the members' Grad-CAM maps, None without any, and why members are left out.

    The maps explain the predictions of `chosen` (fold, probability), whose patches are `patches` (n, 96, 96, 3).
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


def _member_maps(chosen: pd.DataFrame, patches: Images, run: Run) -> NDArray[np.float32]:
    """Return the maps of each patch by the model of its own fold, without TTA."""
    run.check_models()
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


def embedding(runs: Sequence[Run], number: int, store: PatchStore) -> tuple[Run, pd.DataFrame]:
    """Return the run whose model of fold `number` has the highest validation AUC, and a table of patches of that fold.

    Columns: id, label, fold, probability (out of fold), and x and y, the first two principal components of the features that
    the model's classifier reads. There are at most 1,000 patches. Raises UserError if all of `runs` lack a model or are probes.
    """
    models = [run for run in runs if run.fold(number).is_trained and not run.config().probe]
    if not models:
        raise UserError(f"no run here has a model of fold {number}; a probe has the features of a pretrained model")
    run = max(models, key=lambda each: each.fold(number).metrics().valid_auc)
    config, fold = run.config(), run.fold(number)
    count = int(np.clip(MAX_MACS / max(1, fold.metrics().macs), MIN_POINTS, MAX_POINTS))
    drawn = fold.oof().sample(frac=1, random_state=0).head(count).reset_index(drop=True)
    rows = store.rows("train", drawn["id"].to_numpy())
    net = load_best(fold, config, BACKEND)
    if config.norm == "test":
        adapt_norms(net, store, rows, config, BACKEND)
    batches = (rows[start : start + PREDICT_BATCH] for start in range(0, len(rows), PREDICT_BATCH))
    values = torch.cat([features(net, net_input(store.images(batch), config, BACKEND)) for batch in batches]).numpy()
    # With a row and a column of zeros there are two components, however few the patches and features.
    left, scales, _ = np.linalg.svd(np.pad(values - values.mean(axis=0), (0, 1)), full_matrices=False)
    x, y = (left * scales)[:-1, :2].T
    return run, drawn.assign(x=x, y=y)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Return what the classifier of `net`, its last linear layer with one output, reads of `images`: (n, features)."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not layers:
        raise UserError("the model's classifier is not a linear layer")
    read: list[Tensor] = []
    with torch.no_grad(), layers[-1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(1))):
        net(images)
    return read[-1]
