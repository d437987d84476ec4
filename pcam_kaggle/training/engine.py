"""One epoch and one prediction pass: the only loops over batches."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pcam_kaggle import UserError
from pcam_kaggle.config.process import release_memory
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.stain import mix_stains
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.training import tta
from pcam_kaggle.training.augment import augmentation, centre, mixup
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.distributed import average_gradients, rank, size

LOSSES_SHOWN = 5
PREDICT_BATCH = 256
PREFETCH = 3
LOADER_NICE = 5


class TrainBatches(Dataset):
    """All train batches of one fold, in one sequence over the epochs: item i is batch i modulo `steps` of epoch i // steps.

    Order and augmentation come from (seed, fold, epoch, batch) alone, so neither the number of workers nor a resumed run
    changes them. `labels` are 0, 1 or, where they are a teacher's, in between. An item is uint8 (batch, side, side, 3) and
    float32 targets (batch,). Where several processes train the fold, it is this one's part of the batch, as large as the
    others'; up to size - 1 patches of a batch are then left out.
    """

    def __init__(
        self, store: PatchStore, rows: NDArray[np.int64], labels: NDArray[np.float64], config: Config, fold: int
    ) -> None:
        self.store, self.rows, self.config, self.fold = store, rows, config, fold
        self.targets = (labels * (1 - 2 * config.label_smoothing) + config.label_smoothing).astype(np.float32)
        self.steps = max(1, len(rows) // config.batch_size)
        self.count = min(config.batch_size, len(rows)) // size()
        self.augment = augmentation(config.side, config.shift, config.stain_jitter, config.color_jitter, config.degrade)

    def __len__(self) -> int:
        return self.steps * self.config.epochs

    def empty(self) -> tuple[Tensor, Tensor]:
        """Return memory for a batch."""
        shape = (self.count, self.config.side, self.config.side, 3)
        return torch.empty(shape, dtype=torch.uint8), torch.empty(self.count)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, batch = divmod(index, self.steps)
        order = _order(self.config.seed, self.fold, epoch, len(self.rows))
        chosen = order[batch * self.config.batch_size + rank() * self.count :][: self.count]
        draw = np.random.default_rng((self.config.seed, self.fold, epoch, batch * size() + rank()))
        self.augment.set_random_seed(int(draw.integers(2**32)))
        originals = mix_stains(self.store.images(self.rows[chosen]), self.config.stain_mix, draw)
        patches = np.stack([self.augment(image=patch)["image"] for patch in originals])
        patches, targets = mixup(patches, self.targets[chosen], self.config.mixup, draw)
        return torch.from_numpy(patches), torch.from_numpy(targets)


@functools.lru_cache(maxsize=1)
def _order(seed: int, fold: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of `count` patches in `epoch`, drawn once for all of its batches."""
    return np.random.default_rng((seed, fold, epoch)).permutation(count)


class _Slots(Dataset):
    """`data`, each batch written into one of `count` places in shared memory, by turns; an item is the number of its place.

    A batch that is sent instead is mapped anew by every process that touches it, which costs a step on a CPU a twentieth.
    """

    def __init__(self, data: TrainBatches, count: int) -> None:
        self.data = data
        try:
            self.places = [tuple(part.share_memory_() for part in data.empty()) for _ in range(count)]
        except RuntimeError:
            raise UserError(
                f"batch_size={data.config.batch_size}: shared memory has no room for {count} batches; use a smaller one, or "
                "make it larger (docker run --shm-size 1g)"
            ) from None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        place = index % len(self.places)
        for to, part in zip(self.places[place], self.data[index], strict=True):
            to.copy_(part)
        return place


def batches(data: TrainBatches, first_epoch: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `data` from `first_epoch` on, augmented in `workers` processes that live through all epochs.

    A batch is valid until the next one is requested. See `_lower_priority` for how the workers share cores with the net.

    Raises:
        UserError: shared memory has no room for the batches that are under way.
    """
    # So many are under way; one more is with the net.
    slots = _Slots(data, PREFETCH * workers + 1)
    # A forked worker inherits OpenCV's pool without its threads, and would wait for them for ever.
    cv2.setNumThreads(0)
    release_memory()
    loader = DataLoader(
        slots,
        batch_size=None,
        sampler=range(first_epoch * data.steps, len(data)),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=_lower_priority,
        generator=torch.Generator(),  # Else the loader draws from the stream that dropout draws from.
    )
    for place in loader:
        patches, targets = slots.places[place]
        # A GPU copies later than it is told to, and from pinned memory alone while it computes.
        yield (patches.pin_memory(), targets.pin_memory()) if torch.cuda.is_available() else (patches, targets)


def _lower_priority(worker: int) -> None:
    """Let the threads of a training step go before this worker, but not the other programs on the machine.

    A worker that takes a core from a step delays all of its threads, since they wait for one another. As a batch process it
    never interrupts them when it wakes up. Its share of a busy machine stays near that of others: at a low priority, or in the
    idle class, it would starve beside any program that computes.
    """
    # Windows has neither call, macOS not the second.
    with contextlib.suppress(AttributeError, OSError):
        os.nice(LOADER_NICE)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def learning_rate(config: Config, progress: float) -> float:
    """Return the learning rate after `progress` epochs, of 0 to `config.epochs`.

    `cosine`: linear from 0 over the warm-up, then half a cosine to 1 % (Loshchilov & Hutter 2017). `onecycle`: half a
    cosine up from 4 % over the first 30 %, half a cosine down to 0.01 % (Smith & Topin 2019).
    """

    def half_cosine(start: float, end: float, part: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * min(1.0, part))) / 2

    if config.schedule == "onecycle":
        rise = 0.3 * config.epochs
        if progress < rise:
            return config.lr * half_cosine(0.04, 1.0, progress / rise)
        return config.lr * half_cosine(1.0, 1e-4, (progress - rise) / (config.epochs - rise))
    if progress < config.warmup_epochs:
        return config.lr * progress / config.warmup_epochs
    return config.lr * half_cosine(
        1.0, 0.01, (progress - config.warmup_epochs) / max(1e-9, config.epochs - config.warmup_epochs)
    )


@dataclass(slots=True)
class Learner:
    """What changes during training."""

    net: nn.Module
    average: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    backend: Backend


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, weight: float) -> None:
    """Move the weights and statistics of `average` towards those of `net` by `weight`, in (0, 1]."""
    pairs = list(zip(average.state_dict().values(), net.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([to for to, _ in floats], [new for _, new in floats], weight)
    for to, new in pairs:
        if not to.is_floating_point():
            to.copy_(new)


def average_weight(config: Config, steps: int, taken: int) -> float:
    """Return how much the weights after `taken` steps count in their moving average, with `steps` an epoch.

    One over the horizon in steps, and more at the start, where the average would else hold on to the initial weights.
    """
    return max(1 / max(1.0, config.average_epochs * steps), 9 / (9 + taken))


def train_epoch(learner: Learner, source: Iterator[tuple[Tensor, Tensor]], steps: int, epoch: int, config: Config) -> float:
    """Take `steps` batches of `source` through the net; return the mean loss.

    Raises UserError where a loss is not finite, with the losses and the rate that led to it.
    """
    learner.net.train()
    losses = []
    for step in tqdm(range(steps), f"epoch {epoch + 1}", leave=False, delay=2, disable=None):
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
        nn.utils.clip_grad_norm_(learner.net.parameters(), config.clip_norm)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        follow(learner.average, learner.net, average_weight(config, steps, epoch * steps + step))
        losses.append(loss.detach())
        # Reading a loss waits for the GPU, so they are read in groups.
        if step % 25 == 24 or step == steps - 1:
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


def adapt_norms(net: nn.Module, store: PatchStore, rows: NDArray[np.int64], config: Config, backend: Backend) -> None:
    """Replace the statistics of `net`'s batch norms by those of the patches in `rows` (Schneider et al. 2020).

    No label is read. Each batch of patches counts the same.
    """
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
    starts = range(0, len(rows), PREDICT_BATCH)
    with torch.inference_mode(), backend.autocast():
        for count, start in enumerate(starts, 1):
            for norm in norms:
                norm.momentum = 1 / count
            net(backend.images(torch.from_numpy(centre(store.images(rows[start : start + PREDICT_BATCH]), config.side))))


def predict_logits(
    net: nn.Module, store: PatchStore, rows: NDArray[np.int64], config: Config, backend: Backend, n_views: int, what: str
) -> Tensor:
    """Return the logits of the patches in `rows` under `n_views` views: float32 (views, n) on the CPU."""
    net.eval()
    logits = []
    starts = range(0, len(rows), PREDICT_BATCH)
    with torch.inference_mode(), backend.autocast():
        for start in tqdm(starts, what, leave=False, delay=2, disable=None):
            patches = centre(store.images(rows[start : start + PREDICT_BATCH]), config.side)
            images = backend.images(torch.from_numpy(patches))
            logits.append(torch.stack([net(view).float() for view in tta.views(images, n_views)]).cpu())
    return torch.cat(logits, dim=1)
