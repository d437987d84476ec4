"""Models of timm, created with a config's arguments and completely filled with its weights."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.models.weights import import_timm, is_wheel_file, read_weights, weights_file

log = logging.getLogger(__name__)

HEAD_STD = 0.01
# Arguments that are classes, which JSON can only name.
LAYER_ARGUMENTS = ("mlp_layer", "norm_layer", "attn_layer")
# Of self-supervised training, the network that is used afterwards: DINO's and MoCo's.
PREFERRED = ("teacher.", "encoder_q.")
PATCH_KERNELS = "patch_embed.proj.weight"

Tensors = Mapping[str, Tensor]


def create_timm(config: Config, weights: bool = True) -> Any:
    """Return timm's model of `config` with a new classifier of one output on a backbone that is filled from its weights.

    timm first adapts the weights to the model: it renames tensors and resamples position embeddings. Then they must contain
    each parameter and buffer of the backbone in its shape and, besides these, only a classifier, which is dropped. The
    exception are weights that timm publishes in a format of their own (`custom_load`), which the model's own code reads.

    Raises UserError if timm has no such model, weights are missing or do not fit, or the model has no classifier.
    """
    timm, name = import_timm(), config.model.removeprefix("timm:")
    source, _, repository = name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        download = f"run `hf download {repository} --local-dir FOLDER` and set weights=FOLDER instead"
        raise UserError(f"model={config.model}: models are not downloaded from Hugging Face; {download}")
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5])
        raise UserError(f"model={config.model}: timm has no such model" + (f"; it has {similar}" if similar else ""))
    arguments, overlay = _arguments(config)
    create = partial(timm.create_model, name, num_classes=1, drop_rate=config.dropout, **arguments)
    if weights and config.weights:
        model = _create_filled(create, name, config.weights, overlay)
    else:
        model = create(pretrained_cfg_overlay=overlay)
    heads = classifier_prefixes(model)
    head = [parameter for key, parameter in model.named_parameters() if key.startswith(heads)]
    if not head:
        raise UserError(f"model=timm:{name}: it has no classifier, so it gives no logit; choose another model")
    # timm initialises a classifier for a thousand classes, with which a single logit would start in the tens.
    for parameter in head:
        nn.init.normal_(parameter, std=HEAD_STD)
    return model


def _create_filled(create: Callable[..., Any], name: str, weights: str, overlay: dict[str, Any]) -> Any:
    file = weights_file(name, weights)
    tensors: Tensors = read_weights(file, name) if file else {}
    message = f"{file or 'weights=pretrained'}: does not fit timm:{name}"
    try:
        model = _filled(create, overlay, tensors, message)
    except Exception as error:
        model = create(pretrained_cfg_overlay=overlay)
        wrapper = _wrapper(tensors, model.state_dict(), file) if tensors else ""
        if not wrapper:
            # timm's adaptation of weights to a model raises errors of any type where they are of another one.
            if tensors and not isinstance(error, UserError):
                _backbone_tensors(message, model, tensors, tensors)
            raise
        inside = {key.removeprefix(wrapper): value for key, value in tensors.items() if key.startswith(wrapper)}
        model = _filled(create, overlay, inside, f"{file}: {wrapper}* does not fit timm:{name}")
        if others := [key for key in tensors if not key.startswith(wrapper)]:
            log.warning("weights=%s: only the tensors %s* are used; left out: %s", file, wrapper, examples(others))
    # The EMA is a deep copy of the model and would copy the file's tensors with it.
    model.pretrained_cfg.pop("state_dict", None)
    if file and not is_wheel_file(file, name) and not {"mean", "std"} <= overlay.keys():
        means = ", ".join(f"{key} {model.pretrained_cfg[key]}" for key in ("mean", "std"))
        log.warning("weights=%s: does not say which mean and std it expects; timm's for %s: %s", file, name, means)
    return model


def _filled(create: Callable[..., Any], overlay: dict[str, Any], tensors: Tensors, message: str) -> Any:
    """Return the model completely filled with `tensors`, or without any with timm's own; `message` begins a UserError."""
    source = {"state_dict": dict(tensors)} if tensors else {}
    with _complete_loading(message, tensors):
        return create(pretrained=True, pretrained_cfg_overlay=overlay | source)


def _wrapper(tensors: Tensors, model: Tensors, file: Path | None) -> str:
    """Return the prefix, such as `backbone.`, under which `tensors` have most of the model's names; empty if there is none.

    Raises UserError if several prefixes have equally many, and none is one of `PREFERRED`.
    """
    ends = {name: [0, *(dot.end() for dot in re.finditer(r"\.", name))] for name in tensors}
    counts = Counter(name[:end] for name in tensors for end in ends[name] if name[end:] in model)
    most = max(counts.values(), default=0)
    # Fewer are a coincidence: many models have a norm and a head.
    best = [prefix for prefix, count in counts.items() if count == most > len(model) / 2]
    best = [prefix for prefix in best if prefix.startswith(PREFERRED)] or best
    if len(best) > 1:
        raise UserError(
            f"{file}: holds several models ({', '.join(f'{prefix}*' for prefix in best)}); save one as a state_dict"
        )
    return best[0] if best else ""


def classifier_prefixes(model: Any) -> tuple[str, ...]:
    """Return the prefixes of the names of the last layers' tensors in timm's `model`; a distilled model has two classifiers."""
    names = model.pretrained_cfg["classifier"] or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _arguments(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments of `timm.create_model`, and what replaces fields of `pretrained_cfg`."""
    timm, name = import_timm(), config.model.removeprefix("timm:")
    arguments: dict[str, Any] = json.loads(config.model_args or "{}")
    overlay: dict[str, Any] = {key: tuple(arguments.pop(key)) for key in ("mean", "std") if key in arguments}
    arguments |= {key: getattr(timm.layers, arguments[key]) for key in LAYER_ARGUMENTS if isinstance(arguments.get(key), str)}
    if config.pool != "default":
        arguments["global_pool"] = config.pool
    size = arguments.get("img_size", config.resize)
    if config.resize not in (0, size):
        raise UserError(f"resize={config.resize} and img_size={size} contradict each other; leave one out")
    if size and timm.get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = size
        overlay["input_size"] = (3, size, size)
    return arguments, overlay


@contextmanager
def _complete_loading(message: str, original: Tensors) -> Iterator[None]:
    """Make `load_state_dict` raise UserError unless it fills the backbone; `original` are the weights that timm was given."""
    load = nn.Module.load_state_dict

    def load_backbone(module: nn.Module, state: Tensors, *_: Any, **__: Any) -> Any:
        return load(module, _backbone_tensors(message, module, state, original or state), strict=False)

    # Patched, since timm only logs what does not match, and loads into a model that it has not returned yet.
    nn.Module.load_state_dict = load_backbone  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _backbone_tensors(message: str, module: nn.Module, state: Tensors, original: Tensors) -> Tensors:
    """Return the tensors of `state` without a classifier; raises UserError unless they fill the backbone of `module`."""
    heads = classifier_prefixes(module)
    both = state, module.state_dict()
    weights, model = ({name: value for name, value in each.items() if not name.startswith(heads)} for each in both)
    shapes = {name: (tuple(weights[name].shape), tuple(model[name].shape)) for name in model if name in weights}
    if PATCH_KERNELS in shapes.keys() & original.keys() and original[PATCH_KERNELS].ndim == 4:
        # timm resamples the kernels of another patch size without a word, and no weights are made for that.
        shapes[PATCH_KERNELS] = tuple(original[PATCH_KERNELS].shape), shapes[PATCH_KERNELS][1]
    groups = {
        "without a place in the model": [name for name in weights if name not in model],
        # Files of PyTorch before 0.4.1 lack these counts, which only a batch norm without a momentum reads.
        "of the model not filled": [name for name in model if name not in weights and not name.endswith("num_batches_tracked")],
        "of another shape": [f"{name} {has} for {needs}" for name, (has, needs) in shapes.items() if has != needs],
    }
    details = [f"{group}: {item}" for group, items in groups.items() for item in items]
    if not details:
        return weights
    counts = ", ".join(f"{group}: {len(items)}" + (f" ({examples(items)})" if items else "") for group, items in groups.items())
    raise UserError(f"{message}; tensors {counts}", details)
