"""Nets of timm, created with a config's arguments and completely filled with its weights."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.models.misfit import advice, patch_size
from pcam_kaggle.models.weights import import_timm, read_weights
from pcam_kaggle.models.weights_source import is_wheel_file, weights_file

log = logging.getLogger(__name__)

HEAD_STD = 0.01
# Arguments that are classes, which JSON can only name.
LAYER_ARGUMENTS = ("mlp_layer", "norm_layer", "attn_layer")


def create_timm(config: Config, weights: bool = True) -> Any:
    """Return timm's net of `config` with a new classifier of one output on a backbone that is filled from its weights.

    timm first adapts the weights to the net: it renames tensors and resamples position embeddings. Then they must contain each
    parameter and buffer of the backbone in its shape and, besides these, only a classifier, which is dropped. The exception are
    weights that timm publishes in a format of their own (`custom_load`), which the net's own code reads.

    Args:
        config: Source of `model`, `model_args`, `weights`, `resize`, `pool` and `dropout`.
        weights: Load the weights; otherwise all are random.

    Returns:
        The net. Its `pretrained_cfg` has the `mean` and `std` that it expects, and the side of its input in `input_size` if
        `fixed_input_size` is true.

    Raises:
        UserError: timm has no such net or refuses an argument, weights are missing or do not fit the net, or the net has no
            classifier.
    """
    timm, name = import_timm(), config.model.removeprefix("timm:")
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5])
        raise UserError(f"model={config.model}: timm has no such net" + (f"; it has {similar}" if similar else ""))
    file = weights_file(name, config.weights) if weights else None
    arguments, overlay = _arguments(config)
    is_given = {"mean", "std"} <= overlay.keys()
    tensors = read_weights(file, name) if file else {}
    source: dict[str, Any] = {"state_dict": tensors}
    if file and not is_wheel_file(file, name):
        # timm copies tensors that it is given, so it reads the file itself; names and shapes are enough to explain an error.
        source = {"file": str(file), "custom_load": False}
        tensors = {key: value.to("meta") for key, value in tensors.items()}

    def create(**more: Any) -> Any:
        return timm.create_model(name, num_classes=1, drop_rate=config.dropout, **arguments, **more)

    if not (weights and config.weights):
        net = create(pretrained_cfg_overlay=overlay)
    else:
        message = f"{file or 'weights=pretrained'}: does not fit timm:{name}"
        try:
            with _complete_loading(message, tensors):
                net = create(pretrained=True, pretrained_cfg_overlay=overlay | (source if file else {}))
        except UserError:
            raise
        except Exception:
            # timm's adaptation of weights to a net raises errors of any type where they are of another one.
            if advised := advice(tensors, create(pretrained_cfg_overlay=overlay).state_dict()) if tensors else "":
                raise UserError(f"{message}{advised}") from None
            raise
        # The moving average is a deep copy of the net and would copy the file's tensors with it.
        net.pretrained_cfg.pop("state_dict", None)
        if file and not is_given and not is_wheel_file(file, name):
            means = ", ".join(f"{key} {net.pretrained_cfg[key]}" for key in ("mean", "std"))
            log.warning("weights=%s: does not say which mean and std it expects; timm's for %s: %s", file, name, means)
    head = head_parameters(net)
    if not head:
        raise UserError(f"model=timm:{name}: it has no classifier, so it gives no logit; choose another net")
    # timm initialises a classifier for a thousand classes, with which a single logit would start in the tens.
    for parameter in head:
        nn.init.normal_(parameter, std=HEAD_STD)
    return net


def head_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the classifiers of a timm net."""
    return [parameter for name, parameter in net.named_parameters() if name.startswith(classifier_prefixes(net))]


def classifier_prefixes(net: Any) -> tuple[str, ...]:
    """Return the prefixes of the names of the classifiers' tensors in a timm net; a distilled net has two classifiers.

    The layers before the last one of a head, which timm keeps for any number of classes, are not included.
    """
    names = net.pretrained_cfg["classifier"] or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _arguments(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `timm.create_model` that `config` names, and what replaces fields of the net's `pretrained_cfg`.

    Raises:
        UserError: A size is given twice, or timm has no layer of a name.
    """
    timm, name = import_timm(), config.model.removeprefix("timm:")
    arguments: dict[str, Any] = json.loads(config.model_args or "{}")
    overlay: dict[str, Any] = {key: tuple(arguments.pop(key)) for key in ("mean", "std") if key in arguments}
    for key in LAYER_ARGUMENTS:
        if isinstance(arguments.get(key), str):
            if not hasattr(timm.layers, arguments[key]):
                raise UserError(f"model_args: timm has no layer {arguments[key]} for {key}")
            arguments[key] = getattr(timm.layers, arguments[key])
    if config.pool not in ("default", "gem"):
        arguments["global_pool"] = config.pool
    size = arguments.get("img_size", config.resize)
    if config.resize not in (0, size):
        raise UserError(f"resize={config.resize} and img_size={size} contradict each other; leave one out")
    if size and timm.get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = size
        overlay["input_size"] = (3, size, size)
    return arguments, overlay


@contextmanager
def _complete_loading(message: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Make each `load_state_dict` in this context raise UserError, starting with `message`, unless it fills the backbone.

    If the number of classes differs from that of the weights, timm itself only logs what did not match. Its call is replaced
    because the function that adapts the weights to the net is only known inside of `timm.create_model`.

    Args:
        message: Start of the error.
        tensors: The weights before timm adapted them, by which an error is explained; empty if unknown.
    """
    load = nn.Module.load_state_dict

    def load_backbone(net: nn.Module, state: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        heads = classifier_prefixes(net)
        backbone = {name: value for name, value in state.items() if not name.startswith(heads)}
        of_net = {name: value for name, value in net.state_dict().items() if not name.startswith(heads)}
        _check_fit(message, backbone, of_net, tensors or backbone)
        return load(net, backbone, strict=False)

    nn.Module.load_state_dict = load_backbone  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _check_fit(message: str, weights: Mapping[str, Tensor], net: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> None:
    """Raise UserError, starting with `message`, unless `weights` and `net` have the same names and shapes."""
    unused = [name for name in weights if name not in net]
    # Files of PyTorch before 0.4.1 lack these counts, which only a batch norm without a momentum reads.
    empty = [name for name in net if name not in weights and not name.endswith("num_batches_tracked")]
    reshaped = [
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in net.items()
        if name in weights and weights[name].shape != value.shape
    ]
    groups = {"without a place in the net": unused, "of the net not filled": empty, "of another shape": reshaped}
    details = [f"{group}: {item}" for group, items in groups.items() for item in items]
    # timm resamples the kernels of another patch size without a word, and no weights are made for that.
    is_resampled = bool(patch_size(original)) and patch_size(original) != patch_size(net)
    if not details and not is_resampled:
        return
    # timm renames the tensors of some files; those names say more about them.
    named = original if original.keys() & net.keys() else weights
    counts = ", ".join(f"{group}: {len(items)}" + (f" ({examples(items)})" if items else "") for group, items in groups.items())
    raise UserError(f"{message}; tensors {counts}{advice(named, net)}", details)
