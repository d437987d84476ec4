"""Our Muon: equal to timm's in fp32, exact under padding, skipped with gradients that are not finite, resumed in place."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.experiments import experiment
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import import_timm
from pcam_kaggle.training import optim
from pcam_kaggle.training.optim import Muon, Orthogonalizer, create_optimizer, is_matrix, load_optimizer, parameter_groups

CONFIG = experiment("bottleneck").config


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return create(Config(n_blocks=2, width=16, max_width=32)).to(memory_format=torch.channels_last)


def draw_gradients(net: nn.Module, seed: int, low_rank: bool = False) -> None:
    """Give every parameter a gradient of another order of magnitude; with `low_rank`, some have equal rows."""
    torch.manual_seed(seed)
    for number, parameter in enumerate(net.parameters()):
        gradient = torch.randn(parameter.shape)
        if low_rank and parameter.ndim > 1 and (seed + number) % 3 == 0:
            gradient[1:] = gradient[:1]
        # In the layout of the parameter, as autograd makes it.
        parameter.grad = torch.empty_like(parameter).copy_(gradient * 10 ** float(torch.empty(()).uniform_(-4, 2)))


# In matrices of low rank the iteration enlarges rounding errors.
@pytest.mark.parametrize(("low_rank", "tolerance"), [(False, 2e-4), (True, 5e-3)])
@pytest.mark.parametrize("fields", [{}, {"symmetry": "d4"}, {"body": "plain", "head": "flatten"}])
def test_steps_equal_timms(fields: dict[str, Any], low_rank: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    from timm.optim import muon

    in_bf16: Callable[..., Tensor] = muon.zeropower_via_newtonschulz
    in_fp32 = lambda *given, **named: in_bf16(*given, **{**named, "dtype": torch.float32})  # noqa: E731
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", in_fp32)
    net = create(Config(n_blocks=3, width=32, max_width=64, **fields))
    other = copy.deepcopy(net)
    ours, theirs = create_optimizer(net, CONFIG), muon.Muon(parameter_groups(other), lr=CONFIG.lr, nesterov=True)
    for step in range(4):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        draw_gradients(net, step, low_rank)
        for parameter, twin in zip(net.parameters(), other.parameters(), strict=True):
            twin.data.copy_(parameter.data)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
        # timm's momentum of Adam has weights that sum to more than one at first.
        excess = (1 - 0.9 ** (step + 1)) / (1 - 0.9 ** (step + 2))
        for old, made, twin in zip(before, net.parameters(), other.parameters(), strict=True):
            decayed = old * (1 - CONFIG.lr * optim.WEIGHT_DECAY * (old.ndim > 1))
            expected = twin if is_matrix(old) else decayed + (twin - decayed) * excess
            torch.testing.assert_close(made - old, expected - old, atol=CONFIG.lr * tolerance, rtol=1e-3)


def test_an_update_is_nearly_orthogonal_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    # Sides of 5 and 16, 20 and 32, share a bucket.
    matrices = [torch.randn(shape) for shape in [(5, 40), (16, 16), (40, 5), (20, 3, 3, 3), (32, 32), (33, 65)]]
    one = torch.ones(())
    together = Orthogonalizer(matrices)(torch.cat([matrix.flatten() for matrix in matrices]), [one] * len(matrices))
    for matrix, direction in zip(matrices, together, strict=True):
        (alone,) = Orthogonalizer([matrix])(matrix.flatten(), [one])
        torch.testing.assert_close(direction, alone, atol=1e-6, rtol=1e-5)
        scale = 0.2 * max(matrix.flatten(1).shape) ** 0.5
        values = torch.linalg.svdvals(direction.flatten(1)) / scale
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
        left, _, right = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
        assert float((direction.flatten(1) / scale * (left @ right)).sum()) > 0.9 * min(matrix.flatten(1).shape)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_an_infinite_gradient_changes_nothing(optimizer: str) -> None:
    net = tiny_net()
    made = create_optimizer(net, Config(optimizer=optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    states = []
    for step in range(3):
        draw_gradients(net, step)
        scaler.scale(torch.zeros(()))
        if step == 1:
            next(iter(net.parameters())).grad[0] = torch.inf
        scaler.unscale_(made)
        scaler.step(made)
        scaler.update()
        state = (tensor for state in made.state.values() for tensor in state.values())
        states.append([tensor.detach().clone() for tensor in (*net.parameters(), *state)])
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, states[0], states[1]))
    assert not any(torch.equal(old, new) for old, new in zip(states[1], states[2], strict=True))


def test_the_learning_rate_is_read_from_tensors_and_a_gradient_may_be_missing() -> None:
    net = tiny_net()
    made = create_optimizer(net, CONFIG)
    assert isinstance(made, Muon)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    draw_gradients(net, 0)
    next(net.parameters()).grad = None
    for rate in (0.0, 1e-3):
        for group in made.param_groups:
            group["lr"].fill_(rate)
        made.step()
        assert all(map(torch.equal, before, net.parameters())) == (rate == 0)
    assert all(bool(parameter.isfinite().all()) for parameter in net.parameters())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "levit_128s", "botnet26t_256", "vit_tiny_patch16_224"])
def test_muon_updates_weights_and_no_table(name: str) -> None:
    import_timm()
    net = create(Config(model=f"timm:{name}"))
    updated = {id(p) for group in create_optimizer(net, CONFIG).param_groups if group["is_muon"] for p in group["params"]}
    chosen = {key for key, parameter in net.named_parameters() if id(parameter) in updated}
    layers = [(key, each) for key, each in net.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    assert chosen == {f"{key}.weight" for key, each in layers if is_matrix(each.weight)}


def test_matrices_are_chosen_as_timm_chooses_them() -> None:
    import_timm()
    from timm.optim import muon

    suitable = partial(muon._is_suitable_for_muon, return_reason=False)
    shapes = [(8,), (1, 197, 64), (32, 1, 3, 3), (3, 27), (4, 512), (4, 513), (32, 3, 3, 3), (4, 2, 72), (2, 4, 8), (1, 128)]
    assert [is_matrix(torch.zeros(shape)) for shape in shapes] == [suitable(torch.zeros(shape)) for shape in shapes]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loaded_state_continues_in_the_optimizers_tensors(optimizer: str, memory_format: torch.memory_format) -> None:
    """Also one of another memory format or with other options, as of a version whose AdamW was not fused."""
    config = Config(optimizer=optimizer)
    net = tiny_net()
    made = create_optimizer(net, config)
    draw_gradients(net, 0)
    made.step()
    twin = copy.deepcopy(net).to(memory_format=memory_format)
    loaded = create_optimizer(twin, config)
    addresses = [tensor.data_ptr() for state in loaded.state.values() for tensor in state.values()]
    saved = copy.deepcopy(made.state_dict())
    options = {"fused": None, "foreach": None, "capturable": True, "lr": 0.0}
    load_optimizer(loaded, {**saved, "param_groups": [{**group, **options} for group in saved["param_groups"]]})
    assert all(torch.is_tensor(group["lr"]) and group["lr"] > 0 for group in loaded.param_groups)
    for each in (net, twin):
        draw_gradients(each, 1)
    made.step()
    loaded.step()
    tolerance = {"rtol": 0, "atol": 0} if memory_format is torch.channels_last else {}
    for parameter, expected in zip(twin.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, **tolerance)
    if optimizer == "adamw":
        assert all(group["fused"] and not group["capturable"] for group in loaded.param_groups)
    else:
        assert addresses == [tensor.data_ptr() for state in loaded.state.values() for tensor in state.values()]


def walk(tensor: Tensor) -> list[int]:
    """Return the strides that tell the order in memory: that of a dimension of size 1 may be any number."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def test_fused_adamw_finds_parameters_gradients_and_state_in_one_order_of_memory() -> None:
    """Also depthwise weights, (channels, 1, k, k), which are in both memory formats; the state is from a contiguous model."""
    import_timm()
    config = Config(model="timm:lcnet_035")
    made = create(config)
    saved, nets = None, [made, copy.deepcopy(made).to(memory_format=torch.channels_last)]
    assert any(p.ndim == 4 and p.shape[1] == 1 < p.shape[2] for p in nets[1].parameters())
    for net in nets:
        optimizer = create_optimizer(net, config)
        if saved:
            load_optimizer(optimizer, saved)
        net(torch.rand(2, 3, 96, 96).to(memory_format=torch.channels_last)).sum().backward()
        optimizer.step()
        saved = optimizer.state_dict()
    for p in nets[1].parameters():
        state = [tensor for tensor in optimizer.state[p].values() if tensor.shape == p.shape]
        assert len(state) == 2
        assert all(walk(tensor) == walk(p) for tensor in (p.grad, *state))
