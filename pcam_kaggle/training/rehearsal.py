"""A rehearsal of a run: a model that lacks weights or does not fit into the device's memory fails in the first minute."""

import numpy as np
import torch
from numpy.typing import NDArray

from pcam_kaggle.core.config import PATCH_SIDE, Config
from pcam_kaggle.models.factory import create
from pcam_kaggle.training.device import Backend, choose_backend, configure_torch, memory_errors
from pcam_kaggle.training.distributed import world_size
from pcam_kaggle.training.embed import mean_features
from pcam_kaggle.training.engine import PREDICT_BATCH, predict_logits
from pcam_kaggle.training.learner import Learner


class _RandomPatches:
    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, (len(rows), PATCH_SIDE, PATCH_SIDE, 3), np.uint8)


def rehearse(config: Config) -> None:
    """Take a step of training on random patches and predict a batch, or embed one for a probe; every rank calls this.

    Nothing is written or drawn. Raises UserError if the config makes no model, or it does not fit into the device's memory.
    """
    configure_torch()
    backend = choose_backend(config.precision)
    with torch.random.fork_rng(range(torch.cuda.device_count())), memory_errors(f"model={config.model}"):
        _rehearse(config, backend)
    if backend.kind == "cuda":
        # The processes of the GPUs need the memory.
        torch.cuda.empty_cache()


def _rehearse(config: Config, backend: Backend) -> None:
    patches, rows = _RandomPatches(), np.arange(PREDICT_BATCH)
    model = backend.place(create(config))
    if config.probe:
        mean_features(model.eval(), patches, rows, config, backend)
        return
    learner = Learner(model, config, backend, config.batch_size // world_size())
    with memory_errors(f"batch_size={config.batch_size}"):
        batch = torch.randint(0, 256, learner.patches.shape, dtype=torch.uint8)
        learner.load(batch, torch.ones(len(batch)), config.lr, 1.0)
        learner.step()
    predict_logits(learner.ema.eval(), patches, rows, config, backend, 1, "rehearse")
