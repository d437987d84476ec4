"""`python -m pcam_kaggle`."""

import sys

from pcam_kaggle.cli import main

if __name__ == "__main__":
    sys.exit(main())
