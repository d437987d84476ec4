"""A stand-in for Apple's GPUs, which have no float64: training, prediction and Grad-CAM leave it to the CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcam_kaggle.models.factory import create
from pcam_kaggle.report.explain import grad_cam
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import adapt_norms, predict_logits, train_epoch
from pcam_kaggle.training.learner import Learner
from pcam_kaggle.training.task import Task
from pcam_kaggle.training.train import FoldData


class OnCpu(Tensor):
    """What `Tensor.cpu` returned, and all that is computed from it."""


class WithoutFloat64(TorchDispatchMode):
    """Takes every tensor for one on a GPU unless `Tensor.cpu` returned it; an operation there that makes float64 raises."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        on_cpu = any(isinstance(leaf, OnCpu) for leaf in tree_leaves(args))
        if not on_cpu and any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f"{operation} made float64, which the device does not have")
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> WithoutFloat64:
    cpu: Callable[[Tensor], Tensor] = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: cpu(tensor).clone().as_subclass(OnCpu))
    return WithoutFloat64()


@pytest.mark.parametrize(
    "fields", [{"optimizer": "muon"}, {"symmetry": "d4", "width": 16, "max_width": 32}, {"model": "timm:test_resnet"}]
)
def test_no_float64_is_made_on_the_device(fields: dict[str, Any], task: Task, gpu: WithoutFloat64) -> None:
    store, config = task.store, replace(task.config, **fields)
    batches = FoldData(replace(task, config=config), 0).train
    backend = Backend("cpu", "fp32", "channels_last")
    with gpu:
        # The stand-in itself refuses float64, but not on the CPU.
        assert torch.ones(3).cpu().double().mean() == 1
        with pytest.raises(TypeError, match="made float64"):
            torch.ones(3).double()
        net = backend.place(create(config))
        learner = Learner(net, config, backend, batches.count)
        loss = train_epoch(learner, (batches[step] for step in range(batches.steps)), batches.steps, 0, config)
        adapt_norms(net, store, batches.rows, config, backend)
        logits = predict_logits(net, store, batches.rows, config, backend, 8, "predict")
        heat = grad_cam(net, backend.images(batches[0][0]), torch.ones(config.batch_size))
    assert 0 < loss < 10
    assert logits.isfinite().all()
    assert heat.isfinite().all()
