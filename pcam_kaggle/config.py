"""Every number that an experiment can turn, with its type, its range and its default."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from pcam_kaggle.errors import UserError

PATCH_SIDE = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One experiment; a field out of its range raises UserError where the config is made."""

    groups: Literal["auto", "slides", "none"] = "auto"
    """Whether patches of one slide share a fold: auto does so wherever a slide map is found."""
    n_splits: int = 5
    """Folds; at least 2."""
    fold_seed: int = 42
    """Seed of the split, apart from the seed of training so that runs stay comparable."""

    model: str = "cnn"
    """`cnn`, our own net, or `timm:NAME`, any classifier of timm."""
    weights: str = ""
    """For timm: empty for random weights, `pretrained` for timm's download, else the path of a weights file."""
    side: int = PATCH_SIDE
    """Side in pixels of the centre crop that the net sees; 32 to 96."""
    body: Literal["plain", "bottleneck"] = "bottleneck"
    """What a block computes: one 3x3 convolution, or 1x1, 3x3, 1x1 with a shortcut."""
    n_blocks: int = 4
    """Blocks after the stem; each doubles the filters and halves the side."""
    width: int = 32
    """Filters of the stem; a multiple of 4."""
    max_width: int = 512
    """Filters at which the doubling ends."""
    depth: int = 1
    """Bodies per block."""
    pool_first: bool = True
    """In the stem, max pooling before batch norm and ReLU: a third faster on a CPU."""
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
    color_jitter: float = 0.1
    """Half width of the random factor of brightness, contrast and saturation; in [0, 1)."""

    epochs: int = 10
    """Passes over the train patches of a fold."""
    batch_size: int = 64
    """Patches per step."""
    lr: float = 2e-3
    """Highest learning rate of AdamW."""
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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training and prediction; auto measures."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of activations; auto measures."""
    seed: int = 42
    """Seed of weights, order and augmentation."""

    tta: Literal[1, 4, 8] = 8
    """Views per patch in prediction: the patch, its rotations, its rotations and reflections."""
    tta_mean: Literal["logits", "probabilities"] = "logits"
    """What is averaged over views."""

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "n_splits": (2, 100),
            "fold_seed": (0, 2**32 - 1),
            "side": (32, PATCH_SIDE),
            "n_blocks": (1, 10),
            "width": (4, 1024),
            "max_width": (4, 8192),
            "depth": (1, 20),
            "hidden": (1, 65536),
            "dropout": (0, 0.99),
            "shift": (0, 4),
            "stain_jitter": (0, 0.99),
            "color_jitter": (0, 0.99),
            "epochs": (1, 10_000),
            "batch_size": (2, 65536),
            "lr": (1e-8, 10),
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
        if self.width % 4 or self.max_width % 4:
            raise UserError(f"width={self.width}, max_width={self.max_width}: both must be multiples of 4")
        if self.side % 2:
            raise UserError(f"side={self.side}: must be even, so that the crop has the patch's centre")
        if self.max_width < self.width:
            raise UserError(f"max_width={self.max_width}: must not be below width={self.width}")
        if self.model == "cnn" and self.weights:
            raise UserError(f"weights={self.weights}: only nets of timm take weights; use model=timm:NAME")
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
