"""The loops over batches: a train epoch, a prediction pass and the adaptation of batch norms."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer

from pcam_kaggle import UserError
from pcam_kaggle.config.logs import progress
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.labelled import Patches
from pcam_kaggle.training import tta
from pcam_kaggle.training.augment import center_crop
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.distributed import average_gradients
from pcam_kaggle.training.schedule import average_weight, learning_rate, update_average

LOSSES_SHOWN = 5
LOSSES_READ_TOGETHER = 25
PREDICT_BATCH = 256
# Largest gradient norm.
CLIP_NORM = 1.0
# Patches that the statistics of batch norms are estimated from, at most.
NORM_PATCHES = 8192


@dataclass(slots=True)
class Learner:
    """The state that training changes, and the backend it runs on.

    Attributes:
        net: The net whose parameters the optimizer updates.
        average: The moving average of its weights, which is validated and predicts; it shares frozen layers with `net`.
        optimizer: Each of its parameter groups has an `lr_scale`, a factor of the learning rate.
        scaler: Gradient scaler, active in fp16 only.
        backend: Device, precision and memory format.
    """

    net: nn.Module
    average: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    backend: Backend


def train_epoch(learner: Learner, source: Iterator[tuple[Tensor, Tensor]], steps: int, epoch: int, config: Config) -> float:
    """Train on the next `steps` batches.

    Args:
        learner: Net, moving average and optimizer, updated in place.
        source: Batches of uint8 patches (n, side, side, 3) and float32 targets (n,).
        steps: Steps per epoch.
        epoch: Number of the epoch, from 0.
        config: Source of the learning rate's schedule and `average_epochs`.

    Returns:
        The mean loss over the steps.

    Raises:
        UserError: A loss is not finite.
    """
    learner.net.train()
    losses = []
    for step in progress(range(steps), f"epoch {epoch + 1}"):
        patches, targets = next(source)
        lr = learning_rate(config, epoch + (step + 1) / steps)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        with learner.backend.autocast():
            logits = learner.net(learner.backend.images(patches))
        loss = binary_cross_entropy_with_logits(logits.float(), targets.to(logits.device, non_blocking=targets.is_pinned()))
        learner.optimizer.zero_grad(set_to_none=True)
        learner.scaler.scale(loss).backward()
        average_gradients(learner.net)
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.net.parameters(), CLIP_NORM)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        update_average(learner.average, learner.net, average_weight(config, steps, epoch * steps + step))
        losses.append(loss.detach())
        # Reading a loss waits for the GPU, so several are read together.
        if (step + 1) % LOSSES_READ_TOGETHER == 0 or step == steps - 1:
            _check_finite(losses, epoch, lr)
    # Apple's GPUs have no float64.
    return float(torch.stack(losses).cpu().double().mean())


def _check_finite(losses: list[Tensor], epoch: int, lr: float) -> None:
    finite = torch.stack(losses).isfinite()
    if not finite.all():
        step = int(finite.logical_not().nonzero()[0])
        before = ", ".join(f"{float(loss):.4g}" for loss in losses[max(0, step - LOSSES_SHOWN) : step]) or "nothing"
        raise UserError(
            f"epoch {epoch + 1}, step {step + 1}: the loss is {float(losses[step])} at a learning rate near {lr:.2g}, after "
            f"{before}; try a smaller lr or precision=fp32"
        )


def adapt_norms(net: nn.Module, patches: Patches, rows: NDArray[np.int64], config: Config, backend: Backend) -> None:
    """Replace the batch norms' statistics, if there are any, by those of the patches to predict (Schneider et al. 2020).

    No label is read. The statistics are means over batches that are drawn at random from the patches with a fixed seed, so the
    order of `rows` does not matter.

    Args:
        net: Net whose `BatchNorm2d` modules change.
        patches: The patches.
        rows: Rows of those to predict, shape (n,).
        config: Source of `side` and `chroma_blur`.
        backend: Device, precision and memory format.
    """
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.train()
    drawn = np.random.default_rng(0).permutation(np.sort(rows))[:NORM_PATCHES]
    n_batches = math.ceil(len(drawn) / PREDICT_BATCH)
    with torch.inference_mode(), backend.autocast():
        for count, batch in enumerate(np.array_split(drawn, n_batches), 1):
            for norm in norms:
                norm.momentum = 1 / count
            net(net_input(patches.images(batch), config, backend))


def predict_logits(
    net: nn.Module,
    patches: Patches,
    rows: NDArray[np.int64],
    config: Config,
    backend: Backend,
    n_views: int,
    description: str,
) -> Tensor:
    """Return the logits of patches under test-time augmentation.

    Args:
        net: Net on the device of `backend`, set to evaluation mode.
        patches: The patches.
        rows: Rows of those to predict, shape (n,).
        config: Source of `side`, `tta_shift` and `chroma_blur`.
        backend: Device, precision and memory format.
        n_views: Views per patch: 1, 4 or 8.
        description: Text before the progress bar.

    Returns:
        float32 (n_views, n) on the CPU.
    """
    net.eval()
    logits = []
    starts = range(0, len(rows), PREDICT_BATCH)
    with torch.inference_mode(), backend.autocast():
        for start in progress(starts, description):
            images = net_input(patches.images(rows[start : start + PREDICT_BATCH]), config, backend)
            logits.append(torch.stack([net(view).float() for view in tta.views(images, n_views, config.tta_shift)]).cpu())
    return torch.cat(logits, dim=1)


def net_input(patches: NDArray[np.uint8], config: Config, backend: Backend) -> Tensor:
    """Return what a net predicts on: the patches' centre, without fine colour detail if the config says so.

    Args:
        patches: RGB uint8 (n, 96, 96, 3).
        config: Source of `side` and `chroma_blur`.
        backend: Device and memory format.

    Returns:
        float32 (n, 3, side, side) in [0, 1] on the device.
    """
    images = backend.images(torch.from_numpy(center_crop(patches, config.side)))
    return tta.blur_chroma(images, config.chroma_blur)
