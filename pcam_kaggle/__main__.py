"""`python -m pcam_kaggle`."""

import gc
import sys

if __name__ == "__main__":
    # The packages make a million objects that live to the end. To look through them for garbage while they are imported, and
    # again when the process ends, takes a third of a short command's time.
    gc.set_threshold(200_000)
    from pcam_kaggle.cli import main

    status = main()
    gc.freeze()
    sys.exit(status)
