"""What code, which packages and which session a result comes from."""

import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "timm", "albumentations", "opencv-python-headless", "numpy", "pandas", "scikit-learn")


@cache
def session_start() -> str:
    """Return when this process first asked, as the start of its session: UTC in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Return the version of each package that a result depends on, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the commit of the code that runs, with `+` where it was changed since; None if no repository tracks it."""
    here = Path(__file__)
    # An installed package may lie in an environment inside another repository.
    tracked = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        subprocess.run(tracked, cwd=here.parent, capture_output=True, check=True)
        return subprocess.run(describe, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
