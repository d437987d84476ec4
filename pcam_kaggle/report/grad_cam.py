"""What a net looked at: Grad-CAM on its last feature map that still tells places apart."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# On a patch of 96 px a map of 3 x 3 says hardly more than left, middle or right.
LEAST_SIDE = 4


def grad_cam(net: nn.Module, images: Tensor, signs: Tensor) -> Tensor:
    """Return where `net` found what speaks for its answer: float32 (n, h, w) in [0, 1], for images (n, 3, h, w).

    Gradient-weighted class activation mapping (Selvaraju et al. 2017, equations 1 and 2) for the logit times `signs` (n,):
    1 asks what speaks for tumour, -1 what speaks against it. Each map is divided by its maximum; one that is zero
    everywhere stays so. The net must be in evaluation mode and return logits (n,).

    Raises ValueError where no module of the net returns a map of more than one position.
    """
    module = feature_module(net, images[:1])
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        # A copy goes on, since the next layer may write into what it is given.
        return kept[-1].clone()

    with torch.enable_grad(), _hooked([module], keep):
        logits = net(images)
        (gradient,) = torch.autograd.grad((logits * signs).sum(), kept[-1])
    maps = (gradient.mean((2, 3), keepdim=True) * kept[-1].detach()).sum(1, keepdim=True).relu().float()
    maps = nn.functional.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def feature_module(net: nn.Module, images: Tensor) -> nn.Module:
    """Return the module of `net` that is the last to return a map (n, channels, h, w) of at least 4 x 4 positions.

    Where none does, the last with more than one position. Raises ValueError where there is none either.
    """
    seen: list[tuple[int, nn.Module]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            seen.append((min(output.shape[2:]), module))

    with torch.no_grad(), _hooked([module for module in net.modules() if module is not net], note):
        net(images)
    for least in (LEAST_SIDE, 2):
        fitting = [module for side, module in seen if side >= least]
        if fitting:
            return fitting[-1]
    raise ValueError("no module of the net returns a map of more than one position")


@contextlib.contextmanager
def _hooked(modules: list[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
