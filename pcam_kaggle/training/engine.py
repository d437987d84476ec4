"""The loops over batches: a train epoch, a prediction pass and the adaptation of batch norms."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

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
from pcam_kaggle.training.device import Backend, is_out_of_memory, memory_errors
from pcam_kaggle.training.learner import Learner
from pcam_kaggle.training.schedule import ema_weight, learning_rate
from pcam_kaggle.training.threads import follow_free_cores

log = logging.getLogger(__name__)

LOSSES_READ_TOGETHER = 25
# Patches that are predicted together where memory suffices; by config the fewer ones that fit where it does not.
PREDICT_BATCH = 256
_fitting: dict[Config, int] = {}
# Patches that the statistics of batch norms are estimated from, and those that are normalised together, at most.
NORM_PATCHES, NORM_BATCH = 8192, 256

Rows = NDArray[np.int64]
Computed = TypeVar("Computed")


def train_epoch(learner: Learner, source: Iterator[tuple[Tensor, ...]], steps: int, epoch: int, config: Config) -> float:
    """Train on the next `steps` batches, those of `epoch` (from 0); return the mean loss. UserError if one is not finite."""
    learner.model.train()
    losses, learner.waited = torch.zeros(steps, device=learner.loss.device), 0.0
    for step in progress(range(steps), f"epoch {epoch + 1}"):
        start = time.perf_counter()
        patches, targets = next(source)
        learner.waited += time.perf_counter() - start
        follow_free_cores()
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
        found = f"the loss is {losses[step]} at a learning rate near {lr:.2g}"
        raise UserError(f"epoch {epoch + 1}, step {step + 1}: {found}; try a smaller lr or precision=fp32")


def in_parts(compute: Callable[[list[Rows]], Computed], rows: Rows, config: Config) -> Computed:
    """Return `compute` of `rows` (n,) in parts that fit into memory: of PREDICT_BATCH, halved as long as they do not.

    Raises UserError if a single patch does not fit.
    """
    follow_free_cores()
    first = _fitting.get(config, PREDICT_BATCH)
    with memory_errors(f"model={config.model}"):
        while True:
            size = min(_fitting.get(config, PREDICT_BATCH), len(rows))
            try:
                computed = compute(np.array_split(rows, math.ceil(len(rows) / size)))
                break
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                _fitting[config] = size // 2
            # Here the error no longer refers to tensors.
            torch.cuda.empty_cache()
    if size < min(first, len(rows)):
        log.warning("model=%s: predicts %d patches at a time, because more do not fit into memory", config.model, size)
    return computed


def adapt_norms(net: nn.Module, patches: Patches, rows: Rows, config: Config, backend: Backend) -> None:
    """Replace the statistics of the batch norms of `net`, if any, by those of the patches to predict (Schneider et al. 2020).

    They are means over batches of NORM_BATCH patches, fewer where memory does not suffice, drawn from those in `rows` (n,) with
    a fixed seed and normalised by their own statistics. The order of `rows` does not matter.
    """
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    drawn = np.random.default_rng(0).permutation(np.sort(rows))[:NORM_PATCHES]
    for norm in norms:
        # The running statistics are then those of the last batch.
        norm.train().momentum = 1.0

    def statistics(parts: list[Rows]) -> list[list[Tensor]]:
        found = []
        for part in parts:
            net(net_input(patches.images(part), config, backend))
            found.append([torch.stack(_statistics(norm)) for norm in norms])
        return found

    with torch.inference_mode(), backend.autocast():
        batches = np.array_split(drawn, math.ceil(len(drawn) / NORM_BATCH))
        found = [each for batch in batches for each in in_parts(statistics, batch, config)]
        for norm, *of_batches in zip(norms, *found, strict=True):
            for buffer, mean in zip(_statistics(norm), torch.stack(of_batches).mean(0), strict=True):
                buffer.copy_(mean)
    net.eval()


def _statistics(norm: nn.BatchNorm2d) -> list[Tensor]:
    return [norm.get_buffer("running_mean"), norm.get_buffer("running_var")]


def predict_logits(
    net: nn.Module, patches: Patches, rows: Rows, config: Config, backend: Backend, n_views: int, description: str
) -> Tensor:
    """Return logits of `n_views` (1, 4 or 8) views of `rows` (n,), float32 (n_views, n) on the CPU; `net` is in eval mode."""
    net = fold_norms(net)

    def predict(parts: list[Rows]) -> list[Tensor]:
        views = (net_views(patches, part, config, backend, n_views) for part in parts)
        return [torch.stack([net(view).float() for view in each]) for each in views]

    logits = []
    with torch.inference_mode(), backend.autocast():
        for start in progress(range(0, len(rows), PREDICT_BATCH), description):
            logits += in_parts(predict, rows[start : start + PREDICT_BATCH], config)
        # At the end, since it waits for the GPU, which computes a batch while the next one is read.
        return torch.cat(logits, dim=1).cpu()


def net_views(patches: Patches, rows: Rows, config: Config, backend: Backend, n_views: int) -> list[Tensor]:
    """Return `n_views` views of the patches in `rows` (n,), each as `net_input` returns it."""
    return tta.views(net_input(patches.images(rows), config, backend), n_views, config.tta_shift)


def net_input(patches: NDArray[np.uint8], config: Config, backend: Backend) -> Tensor:
    """Return the centre of `patches`, RGB uint8 (n, 96, 96, 3), as a model reads it: float32 (n, 3, side, side) in [0, 1]."""
    batch = torch.from_numpy(center_crop(patches, config.side))
    if backend.kind == "cuda":
        # The copy then does not wait for the kernels before it.
        batch = batch.pin_memory()
    return tta.blur_chroma(backend.images(batch), config.chroma_blur)
