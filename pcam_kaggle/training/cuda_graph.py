"""The step as a CUDA graph: its kernels launched at once, and used only where it computes what the eager code does."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pcam_kaggle.training.distributed import world_size
from pcam_kaggle.training.learner import Learner

log = logging.getLogger(__name__)

Work = Callable[[], object]
# Steps that are compared, and the learning rate and the weight of the EMA during them.
CHECKED_STEPS = 3
CHECKED_LR, CHECKED_WEIGHT = 1e-3, 0.1
# Largest difference between graph and eager code, relative to what the steps change; kernels that add in any order differ too.
TOLERANCE = 0.02


def capture(work: Work) -> Work:
    """Return a call that repeats the kernels of `work`; raise RuntimeError if it waits for the device or lacks memory."""
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    # Libraries allocate and choose algorithms in their first call.
    with torch.cuda.stream(aside):
        work()
    torch.cuda.synchronize()
    # What waits for the device raises here; during a capture it would leave the allocator and the generator in disorder.
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(aside):
            work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    finally:
        torch.cuda.set_stream(current)
    return graph.replay


def fastest_step(learner: Learner) -> Work | None:
    """Return a CUDA graph of the step of `learner` if a few steps with it end as eager ones, or None; `steps` says why."""
    if learner.backend.kind != "cuda" or world_size() > 1:
        learner.steps = f"eager, because the device is {learner.backend.kind} or several ranks train a fold"
        return None
    replay, reason = compared(learner, capture)
    learner.steps = f"{'as a CUDA graph' if replay else 'eager'}, because {reason}"
    log.info("train: steps %s", learner.steps)
    return replay


def compared(learner: Learner, capture: Callable[[Work], Work]) -> tuple[Work | None, str]:
    """Return the graph of the step if it agrees with the eager steps, otherwise None; and the reason."""
    try:
        eager = _changed_by(learner.compute, learner)
        with _restored(learner):
            replay = capture(learner.compute)
        differences = torch._foreach_sub(_changed_by(replay, learner), eager)
        size, difference = (float(torch.stack(torch._foreach_norm(each)).norm()) for each in (eager, differences))
    except (RuntimeError, AssertionError) as error:
        return None, f"the graph failed: {' '.join(str(error).split())[:200]}"
    found = f"after {CHECKED_STEPS} steps both differ by {difference:.2g}, and have moved by {size:.2g}"
    # Also false if one is not finite.
    return (replay if size > 0 and difference <= TOLERANCE * size else None), found


def _changed_by(step: Work, learner: Learner) -> list[Tensor]:
    """Return what a few calls of `step` add to the trained tensors of `learner`, whose state stays."""
    with _restored(learner) as saved:
        if learner.scaler.is_enabled():
            # At a training's scale the first steps may overflow, and change nothing.
            learner.scaler.update(1.0)
        draw = torch.Generator().manual_seed(0)
        for _ in range(CHECKED_STEPS):
            patches = torch.randint(0, 256, learner.patches.shape, dtype=torch.uint8, generator=draw)
            learner.load(patches, torch.rand(learner.targets.shape, generator=draw).round(), CHECKED_LR, CHECKED_WEIGHT)
            step()
        moved: list[Tensor] = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
        moved += [buffer for buffer in learner.ema.buffers() if buffer.is_floating_point()]
        return [tensor.detach() - saved[id(tensor)] for tensor in moved]


@contextmanager
def _restored(learner: Learner) -> Iterator[dict[int, Tensor]]:
    """Yield copies of the tensors of `learner` by their id; restore it and the random numbers after the block."""
    optimizer, scaler = learner.optimizer, learner.scaler
    # The scaler makes its tensors in its first call.
    scaler.scale(learner.loss.detach())
    scaling = scaler.state_dict()
    saved = {id(tensor): tensor.detach().clone() for tensor in learner.tensors()}
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield saved
    finally:
        if scaler.is_enabled():
            # Also forgets an optimizer step that was cut short.
            scaler.update(scaling["scale"])
            scaler.load_state_dict(scaling)
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        for tensor in learner.tensors():
            # AdamW makes its tensors in its first step, as zeros.
            tensor.detach().copy_(saved.get(id(tensor), torch.zeros_like(tensor)))
        optimizer.zero_grad(set_to_none=True)
