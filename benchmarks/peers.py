"""What people train this net by: a loop of their own, Lightning, fastai, timm's task; each as documented, for two cores.

All read TIFs by cv2 in a `Dataset`, augment as we do and take the same steps: the same net, optimizer, loss and clipping, two
loader processes that live through all epochs (fastai's through one), nothing logged or saved. None averages weights, which
spares them a little. All have one cycle of the learning rate, which each of them offers.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.layout import Data
from pcam_kaggle.models.factory import create, create_optimizer, import_timm
from pcam_kaggle.training.augment import augmentation, centre

WORKERS = 2
PREDICT_BATCH = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}

Predict = Callable[[str, NDArray[np.object_]], NDArray[np.float32]]


class Patches(Dataset):
    """Patches of one split, read by cv2: float32 (3, side, side) in [0, 1], with their labels where there are some.

    Those with labels are augmented.
    """

    def __init__(
        self, folder: Data, split: str, ids: NDArray[np.object_], config: Config, labels: NDArray[np.float32] | None = None
    ) -> None:
        self.folder, self.split, self.ids, self.config, self.labels = folder.patches(split), split, ids, config, labels
        self.augment = augmentation(config.side, config.shift, config.stain_jitter, config.color_jitter, config.degrade)
        # The loader's processes are the parallel ones.
        cv2.setNumThreads(0)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, np.float32] | Tensor:
        patch = cv2.imread(str(self.folder / f"{self.ids[index]}.tif"), cv2.IMREAD_COLOR_RGB)
        if self.labels is None:
            return _image(centre(patch, self.config.side))
        return _image(self.augment(image=patch)["image"]), self.labels[index]


def _image(patch: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(patch.transpose(2, 0, 1))).float() / 255


@dataclass(frozen=True, slots=True)
class Task:
    """What to train, on which patches, for how many epochs; in which arithmetic and memory format."""

    data: Data
    config: Config
    ids: NDArray[np.object_]
    labels: NDArray[np.float32]
    epochs: int
    precision: str
    channels_last: bool

    def net(self) -> nn.Module:
        """Return the net, the same for all."""
        torch.manual_seed(self.config.seed)
        return create(self.config, weights=False)

    def train_patches(self) -> Patches:
        """Return the patches to train on."""
        return Patches(self.data, "train", self.ids, self.config, self.labels)

    def total(self) -> int:
        """Return the number of steps."""
        return self.epochs * (len(self.ids) // self.config.batch_size)

    def loader(self) -> DataLoader:
        """Return the plain DataLoader of the patches to train on."""
        return DataLoader(
            self.train_patches(),
            self.config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=WORKERS,
            persistent_workers=True,
        )

    def valid_loader(self, split: str, ids: NDArray[np.object_]) -> DataLoader:
        """Return the plain DataLoader of patches to predict."""
        return DataLoader(Patches(self.data, split, ids, self.config), PREDICT_BATCH, num_workers=WORKERS)


Peer = Callable[[Task, Callable[[], None]], Predict]


def one_cycle(optimizer: torch.optim.Optimizer, task: Task) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return torch's own schedule."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, task.config.lr, task.total() + 1, cycle_momentum=False)


def for_steps(loader: DataLoader, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` batches of `loader`, epoch after epoch."""
    left = count(steps, -1)
    while True:
        for batch in loader:
            if not next(left):
                return
            yield batch


def plain_loop(task: Task, on_step: Callable[[], None]) -> Predict:
    """Train by the loop of PyTorch's tutorials."""
    net = task.net().to(memory_format=FORMATS[task.channels_last])
    optimizer, criterion = create_optimizer(net, task.config), nn.BCEWithLogitsLoss()
    scheduler = one_cycle(optimizer, task)
    net.train()
    for images, targets in for_steps(task.loader(), task.total()):
        placed = images.to(memory_format=FORMATS[task.channels_last])
        with torch.autocast("cpu", DTYPES[task.precision], enabled=task.precision != "fp32"):
            loss = criterion(net(placed).float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), task.config.clip_norm)
        optimizer.step()
        scheduler.step()
        on_step()
    return _predict_by(net, task)


def lightning(task: Task, on_step: Callable[[], None]) -> Predict:
    """Train by PyTorch Lightning's Trainer, without logger, checkpoints, bars and sanity checks."""
    import_timm()
    from lightning.pytorch import Callback, LightningModule, Trainer

    warnings.filterwarnings("ignore", module="lightning")

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, targets = batch
            logits = self.net(images.to(memory_format=FORMATS[task.channels_last]))
            return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)

        def predict_step(self, images: Tensor) -> Tensor:
            return self.net(images.to(memory_format=FORMATS[task.channels_last])).float().sigmoid()

        def configure_optimizers(self) -> dict:
            optimizer = create_optimizer(self.net, task.config)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle(optimizer, task), "interval": "step"}}

    class Steps(Callback):
        def on_train_batch_end(self, *of_batch: object) -> None:
            on_step()

    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        max_steps=task.total(),
        gradient_clip_val=task.config.clip_norm,
        callbacks=[Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Module().to(memory_format=FORMATS[task.channels_last])
    trainer.fit(module, task.loader())

    def predict(split: str, ids: NDArray[np.object_]) -> NDArray[np.float32]:
        return torch.cat(trainer.predict(module, task.valid_loader(split, ids))).numpy()

    return predict


def fastai(task: Task, on_step: Callable[[], None]) -> Predict:
    """Train by fastai's Learner and its one cycle; its own mixed precision is for CUDA alone."""
    import_timm()
    from fastai.callback.channelslast import ChannelsLast
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.schedule import Learner
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as FastLoader
    from fastai.optimizer import OptimWrapper

    class Autocast(Callback):
        def before_batch(self) -> None:
            self.context = torch.autocast("cpu", DTYPES[task.precision])
            self.context.__enter__()

        def after_pred(self) -> None:
            self.context.__exit__(None, None, None)
            self.learn.pred = self.pred.float()

    class Steps(Callback):
        def after_batch(self) -> None:
            if self.training:
                on_step()

        def before_validate(self) -> None:
            raise CancelValidException

    net, loader = task.net(), {"num_workers": WORKERS, "device": torch.device("cpu"), "persistent_workers": True}
    patches = FastLoader(task.train_patches(), bs=task.config.batch_size, shuffle=True, drop_last=True, **loader)
    # It wants a second one, to validate on, and is then not let.
    loaders = DataLoaders(patches, patches, device=torch.device("cpu"))
    learner = Learner(
        loaders,
        net,
        loss_func=nn.BCEWithLogitsLoss(),
        opt_func=lambda groups, **_: OptimWrapper(opt=create_optimizer(net, task.config)),
        cbs=[
            GradientClip(task.config.clip_norm),
            Steps(),
            *([ChannelsLast()] if task.channels_last else []),
            *([Autocast()] if task.precision == "bf16" else []),
        ],
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(task.epochs, task.config.lr, moms=(0.95, 0.95, 0.95))
    learner.remove_cb(Steps)

    def predict(split: str, ids: NDArray[np.object_]) -> NDArray[np.float32]:
        # A batch is a tuple to fastai, of inputs and then targets, of which there are none here.
        patches = Patches(task.data, split, ids, task.config)
        loader = FastLoader(patches, bs=PREDICT_BATCH, num_workers=WORKERS, after_batch=lambda images: (images,))
        with learner.no_bar(), learner.no_logging():
            return learner.get_preds(dl=loader, act=torch.sigmoid)[0].numpy()

    return predict


def timm(task: Task, on_step: Callable[[], None]) -> Predict:
    """Train by what timm's train.py is made of: its loader, its task, its clipping, its meter."""
    import_timm()
    from timm.data import create_loader
    from timm.task import ClassificationTask
    from timm.utils import AverageMeter, dispatch_clip_grad

    device = torch.device("cpu")
    net = task.net().to(memory_format=FORMATS[task.channels_last])
    loader = create_loader(
        task.train_patches(),
        (3, task.config.side, task.config.side),
        task.config.batch_size,
        is_training=True,
        num_workers=WORKERS,
        device=device,
        use_prefetcher=False,
        persistent_workers=True,
    )
    optimizer = create_optimizer(net, task.config)
    scheduler, losses = one_cycle(optimizer, task), AverageMeter()
    trained = ClassificationTask(net, nn.BCEWithLogitsLoss(), device=device, verbose=False)
    trained.train()
    for images, targets in for_steps(loader, task.total()):
        placed = images.to(memory_format=FORMATS[task.channels_last])
        with torch.autocast("cpu", DTYPES[task.precision], enabled=task.precision != "fp32"):
            loss = trained(placed, targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(net.parameters(), task.config.clip_norm)
        optimizer.step()
        scheduler.step()
        losses.update(loss.item(), len(images))
        on_step()
    return _predict_by(net, task)


def _predict_by(net: nn.Module, task: Task) -> Predict:
    """Return the prediction that people write around a net."""

    def predict(split: str, ids: NDArray[np.object_]) -> NDArray[np.float32]:
        net.eval()
        with torch.inference_mode(), torch.autocast("cpu", DTYPES[task.precision], enabled=task.precision != "fp32"):
            batches = task.valid_loader(split, ids)
            logits = [net(images.to(memory_format=FORMATS[task.channels_last])).float() for images in batches]
        return torch.cat(logits).sigmoid().numpy()

    return predict


PEERS: dict[str, Peer] = {"loop": plain_loop, "lightning": lightning, "fastai": fastai, "timm": timm}
