"""A training step from static tensors: equal to a plain loop, and a CUDA graph is used only where it agrees with it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pcam_kaggle.core.config import Config
from pcam_kaggle.models.factory import create
from pcam_kaggle.training.cuda_graph import _graph_of, compared, fastest_function, fastest_step
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.optim import create_optimizer
from pcam_kaggle.training.step import CLIP_NORM, Learner, TrainStep

CPU = Backend("cpu", "fp32", "channels_last")
COUNT = 6
NETS = {
    "muon": Config(n_blocks=2, width=16, max_width=32, side=32, optimizer="muon"),
    "d4": Config(n_blocks=2, width=16, max_width=32, side=32, optimizer="muon", symmetry="d4"),
    "timm": Config(model="timm:resnet10t", side=32, layer_decay=0.5),
}
Work = Callable[[], None]


def new_step(config: Config, backend: Backend = CPU) -> TrainStep:
    torch.manual_seed(0)
    net = backend.place(create(config)).train()
    return TrainStep(Learner(net, copy.deepcopy(net), create_optimizer(net, config), backend.scaler(), backend), config, COUNT)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (COUNT, 32, 32, 3), dtype=torch.uint8, generator=draw)
    return patches, torch.rand(COUNT, generator=draw).round()


def state(step: TrainStep) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in step.learner.tensors()]


@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
def test_a_step_equals_a_plain_loop(config: Config) -> None:
    step = new_step(config)
    plain = new_step(config).learner
    for seed in range(3):
        patches, targets = batch(seed)
        torch.manual_seed(seed)
        step.load(patches, targets, 1e-3, 0.25)
        step.run()
        torch.manual_seed(seed)
        for group in plain.optimizer.param_groups:
            group["lr"].fill_(1e-3 * group["lr_scale"])
        plain.optimizer.zero_grad()
        images = (patches.permute(0, 3, 1, 2).float() / 255).to(memory_format=torch.channels_last)
        loss = binary_cross_entropy_with_logits(plain.net(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.net.parameters(), CLIP_NORM)
        plain.optimizer.step()
        with torch.no_grad():
            for to, new in zip(plain.average.state_dict().values(), plain.net.state_dict().values(), strict=True):
                to.copy_(to.lerp(new, 0.25) if to.is_floating_point() else new)
        assert float(step.loss) == float(loss.detach())
    for made, expected in zip(step.learner.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def replayed(work: Work) -> Work:
    """Capture as a GPU does, with a call before."""
    work()
    return work


def refused(work: Work) -> Work:
    """Fail as a GPU does, after the state has changed."""
    work()
    raise RuntimeError("operation not permitted when stream is capturing")


def stale(work: Work) -> Work:
    """Repeat nothing, as a graph would that reads other tensors than the caller sets."""
    work()
    return lambda: None


def explosive(step: TrainStep) -> Callable[[Work], Work]:
    def capture(work: Work) -> Work:
        def run() -> None:
            work()
            next(step.learner.net.parameters()).data.fill_(torch.nan)

        return run

    return capture


@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
def test_a_graph_that_agrees_is_used_and_nothing_changes(config: Config) -> None:
    step, untouched = new_step(config), new_step(config)
    torch.manual_seed(5)
    work, reason = compared(step, replayed)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert work is not None
    assert "both differ by 0," in reason
    # The same steps from here give the same weights, as if nothing had been tried.
    for each in (step, untouched):
        torch.manual_seed(1)
        each.load(*batch(0), 1e-3, 0.5)
        each.run()
    for made, expected in zip(step.learner.tensors(), untouched.learner.tensors(), strict=True):
        assert torch.equal(made, expected)


@pytest.mark.parametrize(("capture", "said"), [(refused, "not permitted when stream is capturing"), (stale, "both differ by")])
def test_a_graph_that_fails_or_disagrees_is_not_used(capture: Callable[[Work], Work], said: str) -> None:
    step = new_step(NETS["muon"])
    before = state(step)
    work, reason = compared(step, capture)
    assert work is None
    assert said in reason
    assert all(map(torch.equal, before, state(step)))


def test_a_graph_whose_weights_are_not_numbers_is_not_used() -> None:
    step = new_step(NETS["muon"])
    work, reason = compared(step, explosive(step))
    assert work is None
    assert "differ by nan" in reason


def test_a_cpu_takes_eager_steps_and_says_so(package_log: pytest.LogCaptureFixture) -> None:
    step = new_step(NETS["muon"])
    assert fastest_step(step, refused) is None
    assert "eager steps, because the device is cpu" in package_log.text


def test_a_scaled_step_whose_gradient_overflows_changes_no_weight() -> None:
    step = new_step(NETS["muon"])
    step.learner.scaler = torch.amp.GradScaler("cpu", init_scale=torch.inf)
    parameters = [parameter.detach().clone() for parameter in step.learner.net.parameters()]
    step.load(*batch(0), 1e-3, 0.5)
    step.run()
    assert all(map(torch.equal, parameters, step.learner.net.parameters()))


def doubled(batch: Tensor) -> Tensor:
    return batch.float() * 2


def test_a_function_on_a_cpu_is_called_itself() -> None:
    assert fastest_function(doubled, "cpu", refused) is doubled


@pytest.mark.parametrize("capture", [refused, stale])
def test_a_function_whose_graph_disagrees_stays_eager(capture: Callable[[Work], Work]) -> None:
    # A stale graph repeats the result of its capture.
    call, reason = _graph_of(doubled, torch.ones(4), torch.full((4,), 3.0), "cpu", capture)
    assert call is None
    assert "failed" in reason or "differ by 1" in reason


def test_results_of_a_replayed_function_are_not_overwritten_by_the_next() -> None:
    call, _ = _graph_of(doubled, torch.ones(4), torch.full((4,), 2.0), "cpu", replayed)
    assert call is not None
    first = call(torch.ones(4))
    call(torch.zeros(4))
    assert torch.equal(first, torch.full((4,), 2.0))


def half_done(step: TrainStep) -> Callable[[Work], Work]:
    """Return a capture that fails inside the optimizer, as where it waits for the device."""

    def capture(work: Work) -> Work:
        def fail() -> None:
            raise AssertionError("not all groups are capturable")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step.learner.optimizer, "step", fail)
            work()
        return work

    return capture


@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
def test_a_capture_that_fails_in_the_optimizer_leaves_the_scaler_usable(config: Config) -> None:
    step = new_step(config)
    step.learner.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = state(step)
    replay, reason = compared(step, half_done(step))
    assert replay is None
    assert "not all groups are capturable" in reason
    assert step.learner.scaler.get_scale() == 8.0
    assert all(map(torch.equal, before, state(step)[: len(before)]))
    step.load(*batch(0), 1e-3, 0.5)
    step.run()
    assert not torch.equal(before[0], state(step)[0])


def test_a_graph_is_compared_where_the_scale_of_a_training_overflows() -> None:
    step = new_step(NETS["muon"])
    step.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    replay, reason = compared(step, replayed)
    assert replay is not None
    assert "have moved by 0," not in reason
    assert step.learner.scaler.get_scale() == 2.0**127
