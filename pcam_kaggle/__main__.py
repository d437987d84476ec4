"""`python -m pcam_kaggle` and the command `pcam`."""

import gc
import sys

from pcam_kaggle.cli.main import main as run
from pcam_kaggle.core.process import set_environment


def main() -> int:
    """Run the command line in a process of its own; return its exit status."""
    set_environment()
    try:
        return run()
    finally:
        # Collecting what was imported once more as the process ends takes a third of a short command's time.
        gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
