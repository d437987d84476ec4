"""Why weights do not fit a vision transformer of timm, and which of its arguments makes them fit."""

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def advice(weights: Mapping[str, Tensor], net: Mapping[str, Tensor]) -> str:
    """Return what to set in `model_args` so that `weights` fit, as text to end a message with; empty if nothing is known.

    Args:
        weights: Tensors of the weights by name, as in their file.
        net: Tensors of the net.
    """
    if not weights.keys() & net.keys():
        return "; no name is the same, so they are another net's"
    arguments = {
        **_differing(_layer_scale(weights), _layer_scale(net)),
        **_differing(_register_tokens(weights), _register_tokens(net)),
        **_differing(_mlp(weights), _mlp(net)),
        **_differing(patch_size(weights), patch_size(net)),
        **_differing(_size(weights), _size(net)),
    }
    if not arguments:
        arguments = _position_grid(weights, net)
    return f"; set model_args='{json.dumps(arguments)}'" if arguments else ""


def _differing(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in wanted.items() if found.get(key) != value}


def _layer_scale(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    has_scale = any(name.endswith((".ls1.gamma", ".gamma_1")) for name in tensors)
    return {"init_values": 1e-5 if has_scale else None} if "blocks.0.norm1.weight" in tensors else {}


def _register_tokens(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the number of register tokens; DINOv2's own files call them `register_tokens`."""
    if "cls_token" not in tensors:
        return {}
    tokens = next((tensors[name] for name in ("reg_token", "register_tokens") if name in tensors), None)
    return {"reg_tokens": 0 if tokens is None else tokens.shape[1]}


def _mlp(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return type and width of the layers between attentions; a packed SwiGLU splits the output of its first layer in two."""
    if "blocks.0.mlp.fc1_g.weight" in tensors:
        first = tensors["blocks.0.mlp.fc1_g.weight"]
        return {"mlp_layer": "SwiGLU", "mlp_ratio": round(first.shape[0] / first.shape[1], 5)}
    packed = "blocks.0.mlp.w12.weight" if "blocks.0.mlp.w12.weight" in tensors else "blocks.0.mlp.fc1.weight"
    second = tensors.get("blocks.0.mlp.fc2.weight", tensors.get("blocks.0.mlp.w3.weight"))
    if packed not in tensors or second is None:
        return {}
    hidden, width = tensors[packed].shape[:2]
    ratio = {"mlp_ratio": round(hidden / width, 5)}
    if hidden == 2 * second.shape[1]:
        return {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", **ratio}
    return {"mlp_layer": "Mlp", **ratio}


def patch_size(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the side of the squares that a transformer reads as tokens, in pixels; empty if it reads none."""
    projection = tensors.get("patch_embed.proj.weight")
    return {"patch_size": projection.shape[-1]} if projection is not None and projection.ndim == 4 else {}


def _size(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.") and name.split(".")[1].isdecimal()}
    if "cls_token" not in tensors or not numbers:
        return {}
    return {"embed_dim": tensors["cls_token"].shape[-1], "depth": max(numbers) + 1}


def _position_grid(weights: Mapping[str, Tensor], net: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return whether the class token has a position of its own: a square number of positions leaves none for it."""
    ours, theirs = net.get("pos_embed"), weights.get("pos_embed")
    if ours is None or theirs is None or ours.ndim != 3 or theirs.ndim != 3:
        return {}
    without_class = [math.isqrt(each.shape[1]) ** 2 == each.shape[1] for each in (theirs, ours)]
    return {"no_embed_class": without_class[0]} if without_class[0] != without_class[1] else {}
