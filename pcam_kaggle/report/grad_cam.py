"""Grad-CAM on the last feature map of a net with a useful resolution."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# On a patch of 96 px a map of 3 x 3 is too coarse to locate anything.
MIN_SIDE = 4
NO_MAPS = {"patch_embed", "attn", "attn_drop"}


def grad_cam(net: nn.Module, images: Tensor, signs: Tensor) -> Tensor:
    """Compute gradient-weighted class activation maps (Selvaraju et al. 2017, equations 1 and 2).

    Args:
        net: A net in evaluation mode that returns logits (n,).
        images: (n, 3, h, w).
        signs: (n,), 1 to explain the class tumour, -1 to explain the class no tumour.

    Returns:
        Maps, float32 (n, h, w) in [0, 1], each divided by its maximum unless it is zero everywhere.

    Raises:
        ValueError: No module of the net returns a map of more than one position.
    """
    module = feature_module(net, images[:1])
    features: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        features.append(output.detach().requires_grad_())
        # A copy, since the next layer may be in-place.
        return features[-1].clone()

    with torch.enable_grad(), _hooked([module], record):
        logits = net(images)
        (gradient,) = torch.autograd.grad((logits * signs).sum(), features[-1])
    maps = (gradient.mean((2, 3), keepdim=True) * features[-1].detach()).sum(1, keepdim=True).relu().float()
    maps = nn.functional.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def feature_module(net: nn.Module, images: Tensor) -> nn.Module:
    """Return the last module of `net` whose output is a square map (n, channels, h, w) of at least 4 x 4 positions.

    Without one, return the last module with more than one position.

    Raises:
        ValueError: There is no such module.
    """
    outputs: list[tuple[int, nn.Module]] = []

    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        # The patch is square, and so are its maps; transformers also return tensors with the channels last.
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3]:
            outputs.append((min(output.shape[2:]), module))

    # What a transformer makes of patches, and its attention between them, are no maps of features.
    modules = [module for name, module in net.named_modules() if name and not NO_MAPS & set(name.split("."))]
    with torch.no_grad(), _hooked(modules, record):
        net(images)
    for minimum in (MIN_SIDE, 2):
        candidates = [module for side, module in outputs if side >= minimum]
        if candidates:
            return candidates[-1]
    raise ValueError("no module of the net returns a map of more than one position")


@contextlib.contextmanager
def _hooked(modules: list[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
