"""`python -m pcam_kaggle`."""

import gc
import sys

if __name__ == "__main__":
    # What is imported lives to the end. To look through it for garbage, time and again while it is made and once more when the
    # process ends, takes a third of a short command's time.
    gc.disable()
    from pcam_kaggle.cli import main

    gc.freeze()
    gc.enable()
    try:
        sys.exit(main())
    finally:
        gc.freeze()
