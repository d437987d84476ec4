"""A rehearsal of training, before the hours that come first."""

from pcam_kaggle.core.config import Config
from pcam_kaggle.models.factory import create


def rehearse(config: Config) -> None:
    """Make the model of `config`; raises UserError if that fails."""
    create(config)
