"""A step of training: equal to a plain loop, and a CUDA graph of it is used only where it agrees with the eager step."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pcam_kaggle.core.config import Config
from pcam_kaggle.models.factory import create
from pcam_kaggle.training.cuda_graph import compared
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.learner import CLIP_NORM, Learner

CPU = Backend("cpu", "fp32", "channels_last")
COUNT = 6
NETS = {
    "muon": Config(n_blocks=2, width=16, max_width=32, side=32, optimizer="muon"),
    "d4": Config(n_blocks=2, width=16, max_width=32, side=32, optimizer="muon", symmetry="d4"),
    "timm": Config(model="timm:resnet10t", side=32, layer_decay=0.5),
}
Work = Callable[[], None]


def new_learner(config: Config) -> Learner:
    torch.manual_seed(0)
    return Learner(CPU.place(create(config)).train(), config, CPU, COUNT)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (COUNT, 32, 32, 3), dtype=torch.uint8, generator=draw)
    return patches, torch.rand(COUNT, generator=draw).round()


def take_step(learner: Learner, seed: int = 0, weight: float = 0.5) -> None:
    learner.load(*batch(seed), 1e-3, weight)
    learner.step()


def state(learner: Learner) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in learner.tensors()]


@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
def test_a_step_equals_a_plain_loop(config: Config) -> None:
    learner = new_learner(config)
    plain = new_learner(config)
    for seed in range(3):
        patches, targets = batch(seed)
        torch.manual_seed(seed)
        take_step(learner, seed, 0.25)
        torch.manual_seed(seed)
        for group in plain.optimizer.param_groups:
            group["lr"].fill_(1e-3 * group["lr_scale"])
        plain.optimizer.zero_grad()
        images = (patches.permute(0, 3, 1, 2).float() / 255).to(memory_format=torch.channels_last)
        loss = binary_cross_entropy_with_logits(plain.model(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), CLIP_NORM)
        plain.optimizer.step()
        with torch.no_grad():
            for to, new in zip(plain.ema.state_dict().values(), plain.model.state_dict().values(), strict=True):
                to.copy_(to.lerp(new, 0.25) if to.is_floating_point() else new)
        assert float(learner.loss) == float(loss.detach())
    for made, expected in zip(learner.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def replayed(work: Work) -> Work:
    work()
    return work


def refused(learner: Learner, work: Work) -> Work:
    work()
    raise RuntimeError("operation not permitted when stream is capturing")


def half_done(learner: Learner, work: Work) -> Work:
    """Fail inside the optimizer, as where it waits for the device."""

    def fail() -> None:
        raise AssertionError("not all groups are capturable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.optimizer, "step", fail)
        work()
    return work


def stale(learner: Learner, work: Work) -> Work:
    """Repeat nothing, as a graph would that reads other tensors than the caller sets."""
    work()
    return lambda: None


def explosive(learner: Learner, work: Work) -> Work:
    return lambda: (work(), next(learner.model.parameters()).data.fill_(torch.nan))


@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
def test_a_graph_that_agrees_is_used_and_nothing_changes(config: Config) -> None:
    learner, untouched = new_learner(config), new_learner(config)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    work, reason = compared(learner, replayed)
    assert torch.equal(torch.get_rng_state(), expected)
    assert work is not None
    assert "both differ by 0," in reason
    # The same steps from here give the same weights, as if nothing had been tried.
    for each in (learner, untouched):
        torch.manual_seed(1)
        take_step(each)
    for made, expected in zip(learner.tensors(), untouched.tensors(), strict=True):
        assert torch.equal(made, expected)


@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (refused, "not permitted when stream is capturing"),
        (half_done, "not all groups are capturable"),
        (stale, "both differ by"),
        (explosive, "differ by nan"),
    ],
)
def test_a_refused_graph_leaves_no_trace(capture: Callable[[Learner, Work], Work], message: str, config: Config) -> None:
    learner = new_learner(config)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = state(learner)
    replay, reason = compared(learner, partial(capture, learner))
    assert replay is None
    assert message in reason
    assert learner.scaler.get_scale() == 8.0
    assert all(map(torch.equal, before, state(learner)[: len(before)]))
    take_step(learner)
    assert not torch.equal(before[0], state(learner)[0])


def test_where_scaled_gradients_overflow_a_graph_is_compared_and_a_step_changes_no_weight() -> None:
    learner = new_learner(NETS["muon"])
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    replay, reason = compared(learner, replayed)
    assert replay is not None
    assert "have moved by 0," not in reason
    assert learner.scaler.get_scale() == 2.0**127
    parameters = [parameter.detach().clone() for parameter in learner.model.parameters()]
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=torch.inf)
    take_step(learner)
    assert all(map(torch.equal, parameters, learner.model.parameters()))
