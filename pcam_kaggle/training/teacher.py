"""Distillation: a trained model labels the patches that another one is trained on."""

from collections.abc import Callable

import torch
from torch import Tensor

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.data.folds import FoldsManifest
from pcam_kaggle.models.folded import fold_norms
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training import tta
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import adapt_norms
from pcam_kaggle.training.learner import load_best
from pcam_kaggle.training.task import Task


def check_teacher(teacher: Run, config: Config, manifest: FoldsManifest) -> None:
    """Raise UserError if the run `teacher` cannot teach one of `config` on the folds of `manifest`."""
    teacher.check_models()
    if teacher.made_from().folds_sha256 != manifest.csv_sha256:
        # Its model of a fold saw labels of the student's validation.
        raise UserError(f"{teacher.folder}: the teacher has other folds; use one trained on {manifest.scheme}")
    if (side := teacher.config().side) != config.side:
        raise UserError(f"{teacher.folder}: the teacher has side={side}, this run side={config.side}; use the same")


def load_teacher(task: Task, number: int, backend: Backend) -> Callable[[Tensor], Tensor]:
    """Return a function of images (n, 3, side, side) in [0, 1]: the teacher's probabilities of them, float32 (n,).

    Teacher and student see the same augmented patch, and the student has no other labels (Beyer et al. 2022, "Knowledge
    distillation: A good teacher is patient and consistent"). The teacher is the model of the same fold, so that no label of the
    validation part is seen; it predicts as it does for the test set, but one view.
    """
    fold, store = task.run.fold(number), task.store
    if not fold.is_started:
        fold.record_teacher(task.config.teacher)
    teacher = fold.teacher(task.config.teacher)
    config = Run(teacher.run_folder).config()
    model = load_best(teacher, config, backend)
    if config.norm == "test":
        adapt_norms(model, store, store.rows("test", store.ids("test")), config, backend)
    net = fold_norms(model)

    def teach(images: Tensor) -> Tensor:
        with torch.no_grad(), backend.autocast():
            return net(tta.blur_chroma(images, config.chroma_blur)).float().sigmoid()

    return teach
