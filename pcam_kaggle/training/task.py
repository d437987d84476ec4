"""What training, probe and prediction work on."""

from dataclasses import dataclass

import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.runs.provenance import session_environment
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend, device_name, find_backend


@dataclass(frozen=True, slots=True)
class Task:
    """A run with what it is made from, and the name of its experiment; picklable, as each GPU's process is sent one."""

    run: Run
    experiment: str
    config: Config
    store: PatchStore
    folds: Folds

    def parts(self, number: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return train and validation part of fold `number` (id, label, fold)."""
        table, is_valid = self.folds.table, self.folds.table["fold"] == number
        return table[~is_valid], table[is_valid]


def open_session(task: Task) -> Backend:
    """Prepare this process, and add the session to the run's environment.json; return the backend of `find_backend`."""
    backend = find_backend(task.run, task.config)
    task.run.add_environment(session_environment(backend.record(), device_name(backend.kind), task.store))
    return backend
