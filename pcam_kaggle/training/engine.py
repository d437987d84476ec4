"""The loops over batches: a train epoch, a prediction pass and the adaptation of batch norms."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.logs import progress
from pcam_kaggle.data.labelled import Patches
from pcam_kaggle.models.folded import fold_norms
from pcam_kaggle.training import tta
from pcam_kaggle.training.augment import center_crop
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.learner import Learner
from pcam_kaggle.training.schedule import ema_weight, learning_rate

LOSSES_SHOWN, LOSSES_READ_TOGETHER = 5, 25
# Patches that are predicted together, and those that the statistics of batch norms are estimated from, at most.
PREDICT_BATCH, NORM_PATCHES = 256, 8192


def train_epoch(learner: Learner, source: Iterator[tuple[Tensor, ...]], steps: int, epoch: int, config: Config) -> float:
    """Train on the next `steps` batches, those of `epoch` (from 0); return the mean loss. UserError if one is not finite."""
    learner.model.train()
    losses = torch.zeros(steps, device=learner.loss.device)
    for step in progress(range(steps), f"epoch {epoch + 1}"):
        patches, targets = next(source)
        lr = learning_rate(config, epoch + (step + 1) / steps)
        learner.load(patches, targets, lr, ema_weight(config, steps, epoch * steps + step))
        learner.step()
        losses[step].copy_(learner.loss)
        # Reading waits for the GPU.
        if (step + 1) % LOSSES_READ_TOGETHER == 0 or step == steps - 1:
            _check_finite(losses[: step + 1].tolist(), epoch, lr)
    # Apple's GPUs have no float64.
    return float(losses.cpu().double().mean())


def _check_finite(losses: list[float], epoch: int, lr: float) -> None:
    if not np.isfinite(losses).all():
        step = int(np.isfinite(losses).argmin())
        before = ", ".join(f"{loss:.4g}" for loss in losses[max(0, step - LOSSES_SHOWN) : step]) or "nothing"
        raise UserError(
            f"epoch {epoch + 1}, step {step + 1}: the loss is {losses[step]} at a learning rate near {lr:.2g}, after "
            f"{before}; try a smaller lr or precision=fp32"
        )


def adapt_norms(net: nn.Module, patches: Patches, rows: NDArray[np.int64], config: Config, backend: Backend) -> None:
    """Replace the statistics of the batch norms of `net`, if any, by those of the patches to predict (Schneider et al. 2020).

    They are means over batches drawn from the patches in `rows` (n,) with a fixed seed; the order of `rows` does not matter.
    """
    net.eval()
    norms = [module.train() for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    drawn = np.random.default_rng(0).permutation(np.sort(rows))[:NORM_PATCHES]
    with torch.inference_mode(), backend.autocast():
        for count, batch in enumerate(np.array_split(drawn, math.ceil(len(drawn) / PREDICT_BATCH)), 1):
            for norm in norms:
                norm.momentum = 1 / count
            net(net_input(patches.images(batch), config, backend))


def predict_logits(
    net: nn.Module, patches: Patches, rows: NDArray[np.int64], config: Config, backend: Backend, n_views: int, description: str
) -> Tensor:
    """Return logits of `n_views` (1, 4 or 8) views of `rows` (n,), float32 (n_views, n) on the CPU; `net` is in eval mode."""
    net = fold_norms(net)
    logits = []
    with torch.inference_mode(), backend.autocast():
        for start in progress(range(0, len(rows), PREDICT_BATCH), description):
            images = net_input(patches.images(rows[start : start + PREDICT_BATCH]), config, backend)
            views = tta.views(images, n_views, config.tta_shift)
            logits.append(torch.stack([net(view).float() for view in views]))
        # At the end, since it waits for the GPU, which computes a batch while the next one is read.
        return torch.cat(logits, dim=1).cpu()


def net_input(patches: NDArray[np.uint8], config: Config, backend: Backend) -> Tensor:
    """Return the centre of `patches`, RGB uint8 (n, 96, 96, 3), as a model reads it: float32 (n, 3, side, side) in [0, 1]."""
    batch = torch.from_numpy(center_crop(patches, config.side))
    if backend.kind == "cuda":
        # The copy then does not wait for the kernels before it.
        batch = batch.pin_memory()
    return tta.blur_chroma(backend.images(batch), config.chroma_blur)
