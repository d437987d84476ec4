"""A model of timm as this package runs it: input enlarged and normalised, lower layers frozen."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.cnn import Normalize
from pcam_kaggle.models.timm_model import classifier_prefixes
from pcam_kaggle.models.weights import import_timm


class Backbone(nn.Module):
    """A timm classifier `net` with one output that enlarges and normalises its input as its pretrained weights expect.

    `resize` is the side in pixels that the input is enlarged to; 0 for no change. `frozen` has the names of the parameters and
    buffers that training does not change.

    Shape: RGB (n, 3, side, side) in [0, 1] to logits (n,).
    """

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], resize: int) -> None:
        super().__init__()
        self.resize = resize
        self.normalize = Normalize(mean, std)
        self.net = net
        self.frozen: frozenset[str] = frozenset()
        self.fused: list[Any] = [module for module in net.modules() if getattr(module, "fused_attn", False)]
        classifiers = classifier_prefixes(net)
        for name, module in net.named_modules():
            if f"{name}." in classifiers:
                module.forward = partial(_in_fp32, module.forward)
            elif isinstance(module, nn.Conv2d) and module.groups > 1:
                module.forward = partial(_in_fp32_on_cpu, module.forward)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images `x`."""
        return self.net(self.normalize(enlarge(x, self.resize))).squeeze(1)

    def features(self, x: Tensor) -> Tensor:
        """Return what the classifier reads of images `x`, shape (n, features)."""
        read: list[Tensor] = []
        with self.classifier().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])):
            self(x)
        return read[0]

    def classifier(self) -> nn.Linear:
        """Return the layer that turns `features` into a logit; raises UserError unless it is a single linear layer."""
        layers = [self.net.get_submodule(prefix.removesuffix(".")) for prefix in classifier_prefixes(self.net)]
        if len(layers) != 1 or not isinstance(layers[0], nn.Linear):
            raise UserError("probe=true: the model's classifier is not a single linear layer; use another model")
        return layers[0]

    def freeze(self, fraction: float) -> None:
        """Freeze the lower `fraction` of the layers below the classifier, as timm groups them for layer decay.

        Their weights get no gradient, and their dropout and batch norms stay in evaluation mode. Raises UserError if timm does
        not know the order of the layers.
        """
        net: Any = self.net
        if not hasattr(net, "group_matcher"):
            raise UserError(f"freeze={fraction}: timm does not know the order of the layers; use freeze=0 or another model")
        # Numbered from 0 at the input.
        matched = import_timm().models.group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        layers = {name: layer for name, layer in matched.items() if not name.startswith(classifier_prefixes(net))}
        order = sorted(set(layers.values()))
        lower = order[: round(fraction * len(order))]
        for name, parameter in net.named_parameters():
            if layers.get(name) in lower:
                parameter.requires_grad_(False)
        parameters = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        buffers = [f"{prefix}.{name}" for prefix, module in self._frozen_modules() for name, _ in module.named_buffers()]
        self.frozen = frozenset([*parameters, *buffers])
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen layers are always in the latter."""
        super().train(mode)
        # On a CPU, the backward pass of torch's fused attention takes two fifths of a ViT's training step.
        is_on_cpu = next(self.parameters()).device.type == "cpu"
        for module in self.fused:
            module.fused_attn = not (mode and is_on_cpu)
        for _, module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[tuple[str, nn.Module]]:
        trained = {name: [parameter.requires_grad for parameter in each.parameters()] for name, each in self.named_modules()}
        return [(name, self.get_submodule(name)) for name, flags in trained.items() if name and flags and not any(flags)]


def enlarge(x: Tensor, side: int) -> Tensor:
    """Return float32 images (n, 3, h, w) in [0, 1] resized to `side` px by antialiased bicubic interpolation; 0: unchanged."""
    if not side:
        return x
    # Autocast leaves this operator in the dtype of its input. Bicubic interpolation overshoots at edges.
    return nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def trained_state(net: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `net` by name without those of frozen layers, sharing memory with it."""
    frozen = net.frozen if isinstance(net, Backbone) else frozenset()
    return {name: value for name, value in net.state_dict().items() if name not in frozen}


def copy_trained(net: nn.Module) -> nn.Module:
    """Return a copy of `net` that shares the tensors of its frozen layers."""
    frozen = net.frozen if isinstance(net, Backbone) else frozenset()
    shared = [value for name, value in (*net.named_parameters(), *net.named_buffers()) if name in frozen]
    return copy.deepcopy(net, {id(value): value for value in shared})


def _in_fp32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # With the 8 bits of bf16, about a hundred patches would share each logit.
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.float())


def _in_fp32_on_cpu(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # On a CPU, the bf16 gradient of a depthwise convolution is up to ten times slower.
    return _in_fp32(forward, x).to(x.dtype) if x.device.type == "cpu" else forward(x)
