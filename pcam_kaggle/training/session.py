"""The start of a session: what this process computes on, recorded with the run."""

import dataclasses
import logging

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.files import reading
from pcam_kaggle.core.process import tune_malloc
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models.factory import create
from pcam_kaggle.runs.provenance import session_environment
from pcam_kaggle.runs.records import BackendRecord
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend, choose_backend, device_name, find_device, precisions
from pcam_kaggle.training.distributed import rank
from pcam_kaggle.training.gpus import configure_torch

log = logging.getLogger(__name__)


def open_session(run: Run, config: Config, store: PatchStore) -> Backend:
    """Prepare this process for training or prediction, and add the session to the run's environment.json.

    Args:
        run: The run.
        config: Config of the run.
        store: The packed patches, whose hashes are recorded.

    Returns:
        The backend of `find_backend`.

    Raises:
        UserError: As `find_backend`.
    """
    backend = find_backend(run, config)
    if rank() == 0:
        run.add_environment(session_environment(BackendRecord(**dataclasses.asdict(backend)), device_name(backend.kind), store))
    return backend


def find_backend(run: Run, config: Config) -> Backend:
    """Prepare this process for the nets of `run`; return what they compute on.

    Args:
        run: The run.
        config: Config of the run.

    Returns:
        The backend of the run's last session on this kind of device, otherwise the one that `choose_backend` selects.

    Raises:
        UserError: The device cannot compute, or environment.json is damaged.
    """
    tune_malloc()
    configure_torch()
    kind = find_device()
    used = [entry.backend for entry in run.environments() if entry.backend.kind == kind]
    with reading(run.environment_file):
        backend = Backend(**used[-1].model_dump()) if used else None
    if backend is None:
        # Without a backward pass there is nothing to time, and a second net may not fit into memory.
        precision = precisions(kind)[0] if config.probe and config.precision == "auto" else config.precision
        backend = choose_backend(lambda: create(config, weights=False), config.side, config.batch_size, precision)
    log.debug("%s: backend %s, %s", run.name, backend, "as before" if used else "chosen now")
    return backend
