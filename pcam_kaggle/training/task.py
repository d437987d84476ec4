"""What training, probe and prediction work on."""

from dataclasses import dataclass

from pcam_kaggle.core.config import Config
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.runs.run import Run


@dataclass(frozen=True, slots=True)
class Task:
    """A run with what it is made from; picklable, so that each GPU's process can be sent one.

    Attributes:
        run: The run's folder.
        experiment: Name of its experiment, recorded in the run.
        config: Its config.
        store: The packed patches.
        folds: The folds of the labelled patches.
    """

    run: Run
    experiment: str
    config: Config
    store: PatchStore
    folds: Folds
