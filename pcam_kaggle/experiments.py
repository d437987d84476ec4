"""The experiments that have a name."""

from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError

DEFAULT = "bottleneck"
DEMO = "demo"

EXPERIMENTS: dict[str, tuple[str, Config]] = {
    DEFAULT: (
        "the default: residual bottlenecks, a pooled head",
        Config(epochs=10),
    ),
    "plain": (
        "the baseline, which stays as it is: one 3x3 convolution a block, a flattened head",
        Config(body="plain", head="flatten", pool_first=False, hidden=256, dropout=0.5, epochs=10),
    ),
    DEMO: (
        "for the synthetic patches alone",
        Config(n_splits=3, n_blocks=3, head="flatten", dropout=0.2, batch_size=32, epochs=4, average_epochs=1.0, tta=4),
    ),
}


def experiment(name: str) -> Config:
    """Return the config called `name`; raises UserError where there is none."""
    if name not in EXPERIMENTS:
        raise UserError(f"-e {name}: no such experiment; choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name][1]
