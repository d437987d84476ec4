"""The same training by the loop of PyTorch's tutorials, the implementation that ours is compared with.

It reads TIFs with cv2 in a `Dataset`, augments as we do, and trains the same net with the same optimizer, loss, clipping and
batch size, two persistent loader processes and one cycle of the learning rate. Nothing is logged, saved or validated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.paths import Data
from pcam_kaggle.models.factory import create
from pcam_kaggle.training.augment import augmentation, center_crop
from pcam_kaggle.training.learner import CLIP_NORM
from pcam_kaggle.training.optim import create_optimizer

WORKERS = 2


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
class Peer:
    """How a peer computes what `config` describes on the patches in `data`."""

    data: Data
    config: Config
    precision: str
    channels_last: bool

    def net(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        return self.placed(create(self.config, weights=False))

    def placed(self, what: Any) -> Any:
        """Return a net or a batch in the memory format."""
        return what.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def train(
        self, ids: NDArray[np.object_], labels: NDArray[np.float32], epochs: int, on_step: Callable[[], None] = lambda: None
    ) -> nn.Module:
        """Train on the patches `ids` by the loop of PyTorch's tutorials; return the net."""
        net, criterion, size = self.net().train(), nn.BCEWithLogitsLoss(), self.config.batch_size
        optimizer = create_optimizer(net, self.config)
        steps = epochs * (len(ids) // size)
        scheduler = OneCycleLR(optimizer, self.config.lr, steps + 1, cycle_momentum=False)
        patches = Patches(self.data, "train", ids, self.config, labels)
        loader = DataLoader(patches, size, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)
        for images, targets in (batch for _ in range(epochs) for batch in loader):
            with self.autocast():
                loss = criterion(net(self.placed(images)).float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM)
            optimizer.step()
            scheduler.step()
            on_step()
        return net

    def predict(self, net: nn.Module, split: str, ids: NDArray[np.object_]) -> NDArray[np.float32]:
        """Return the probabilities (n,) of `ids`, one view."""
        net.eval()
        loader = DataLoader(Patches(self.data, split, ids, self.config), batch_size=256, num_workers=WORKERS)
        with torch.inference_mode(), self.autocast():
            return torch.cat([net(self.placed(images)).float() for images in loader]).sigmoid().numpy()
