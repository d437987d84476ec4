"""From the patches of Kaggle's Histopathologic Cancer Detection to a submission, scored out of fold."""

__version__ = "0.1.0"
