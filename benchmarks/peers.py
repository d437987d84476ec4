"""The same training by common implementations: the loop of PyTorch's tutorials and PyTorch Lightning.

All read TIFs with cv2 in a `Dataset`, augment as we do, and train the same net with the same optimizer, loss, clipping and
batch size, two persistent loader processes and one cycle of the learning rate. Nothing is logged, saved or validated.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.paths import Data
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import import_timm
from pcam_kaggle.training.augment import augmentation, center_crop
from pcam_kaggle.training.optim import create_optimizer
from pcam_kaggle.training.step import CLIP_NORM

WORKERS = 2
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


class Patches(Dataset):
    """Patches of one split, read by cv2: float32 (3, side, side) in [0, 1]; augmented, with labels, if `labels` are given."""

    def __init__(
        self, folder: Data, split: str, ids: NDArray[np.object_], config: Config, labels: NDArray[np.float32] | None = None
    ) -> None:
        self.folder, self.ids, self.config, self.labels = folder.patches(split), ids, config, labels
        self.augment = augmentation(config.side, config.stain_jitter, config.color_jitter)
        # Loader processes already run in parallel.
        cv2.setNumThreads(0)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, np.float32] | Tensor:
        patch = cv2.imread(str(self.folder / f"{self.ids[index]}.tif"), cv2.IMREAD_COLOR_RGB)
        if self.labels is None:
            return _image(center_crop(patch, self.config.side))
        return _image(self.augment(image=patch)["image"]), self.labels[index]


def _image(patch: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(patch.transpose(2, 0, 1))).float() / 255


@dataclass(frozen=True, slots=True)
class Task:
    """What to train, on which patches, for how many epochs, in which precision and memory format."""

    data: Data
    config: Config
    ids: NDArray[np.object_]
    labels: NDArray[np.float32]
    epochs: int
    precision: str
    channels_last: bool

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.ids) // self.config.batch_size)

    def net(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        return create(self.config, weights=False).to(memory_format=FORMATS[self.channels_last])

    def loader(self) -> DataLoader:
        patches = Patches(self.data, "train", self.ids, self.config, self.labels)
        size = self.config.batch_size
        return DataLoader(patches, size, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.lr, self.steps + 1, cycle_momentum=False)

    def placed(self, images: Tensor) -> Tensor:
        return images.to(memory_format=FORMATS[self.channels_last])

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


OnStep = Callable[[], None]


def plain_loop(task: Task, on_step: OnStep) -> nn.Module:
    """Train by the loop of PyTorch's tutorials; return the net."""
    net, criterion = task.net(), nn.BCEWithLogitsLoss()
    optimizer = create_optimizer(net, task.config)
    scheduler = task.schedule(optimizer)
    net.train()
    loader = task.loader()
    for images, targets in (batch for _ in range(task.epochs) for batch in loader):
        with task.autocast():
            loss = criterion(net(task.placed(images)).float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM)
        optimizer.step()
        scheduler.step()
        on_step()
    return net


def predict(net: nn.Module, task: Task, split: str, ids: NDArray[np.object_]) -> NDArray[np.float32]:
    """Return the probabilities (n,) of `ids`, one view."""
    net.eval()
    loader = DataLoader(Patches(task.data, split, ids, task.config), batch_size=256, num_workers=WORKERS)
    with torch.inference_mode(), task.autocast():
        return torch.cat([net(task.placed(images)).float() for images in loader]).sigmoid().numpy()


def lightning(task: Task, on_step: OnStep) -> None:
    """Train by PyTorch Lightning's Trainer, without logger, checkpoints, progress bar and sanity checks."""
    import_timm()
    from lightning.pytorch import Callback, LightningModule, Trainer

    warnings.filterwarnings("ignore", module="lightning")

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, targets = batch
            return nn.functional.binary_cross_entropy_with_logits(self.net(task.placed(images)).float(), targets)

        def configure_optimizers(self) -> dict:
            optimizer = create_optimizer(self.net, task.config)
            # Otherwise Lightning refuses to clip, whose gradients are not scaled here.
            optimizer._step_supports_amp_scaling = False
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": task.schedule(optimizer), "interval": "step"}}

    class Steps(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            on_step()

    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        max_steps=task.steps,
        gradient_clip_val=CLIP_NORM,
        callbacks=[Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Module(), task.loader())


PEERS: dict[str, Callable[[Task, OnStep], object]] = {"loop": plain_loop, "lightning": lightning}
