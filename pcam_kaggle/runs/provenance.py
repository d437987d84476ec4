"""Provenance of a result: session, machine, packages and commit."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from pcam_kaggle import __version__
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.runs.records import BackendRecord, Environment

PACKAGES = ("torch", "timm", "albumentations", "opencv-python-headless", "numpy", "pandas", "scikit-learn")


def session_environment(backend: BackendRecord, device: str, store: PatchStore) -> Environment:
    """Return this session's entry of a run's environment.json, with the counts and hashes of the packed patches."""
    return Environment(
        started=session_start(),
        backend=backend,
        device=device,
        cpus=os.cpu_count(),
        machine=platform.machine(),
        python=platform.python_version(),
        pcam_kaggle=__version__,
        commit=commit(),
        packages=versions(),
        data=store.manifest.model_dump(include={"train", "test", "train_sha256", "test_sha256"}),
    )


@cache
def session_start() -> str:
    """Return the time of the first call in this process: UTC in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Return the version of each package that a result depends on, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """Return the commit of the running code, followed by `+` if files were changed since; None outside a repository."""
    here = Path(__file__)
    # An installed package may be in an environment inside another repository.
    tracked = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        subprocess.run(tracked, cwd=here.parent, capture_output=True, check=True)
        return subprocess.run(describe, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
