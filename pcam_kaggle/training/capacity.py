"""What a run needs of a machine, estimated before it starts, and the settings that make it fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import PROBE
from pcam_kaggle.models.factory import create, macs
from pcam_kaggle.training.engine import NORM_PATCHES, PREDICT_BATCH

# Bytes per trained parameter on a GPU: weight, gradient, moving average, and AdamW's two moments, all fp32; and in checkpoints.
TRAINED_BYTES, SAVED_BYTES = 20, 20
# Bytes per parameter that is only read: fp32, and autocast's copy in 16 bits.
READ_BYTES = 6
# The shares below are assumptions, not measurements.
# Autocast halves most activations; the allocator and the kernels' work space take a part of the memory.
ACTIVATION_SHARE, MEMORY_SHARE = 0.6, 0.9
# Share of the data sheet's rate that no training reaches, so that the time is a lower bound.
REACHED_SHARE = 0.5
# Share of the activations that remains if they are computed again.
CHECKPOINTED_SHARE = 0.25
# A forward pass alone holds a layer's input, its output and those of its branches.
HELD_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """What a session may use.

    Attributes:
        gpus: Number of GPUs.
        memory: Bytes of each.
        operations: Floating point operations per second of each in 16 bits, from its data sheet.
        output: Bytes that are saved.
        hours: Duration of a session.
        cpus: Number of CPUs, which prepare the patches; infinite if they are not known.
    """

    gpus: int
    memory: float
    operations: float
    output: float
    hours: float
    cpus: float = math.inf


# In fp16 or bf16, dense, from the data sheets; the time on other GPUs is not checked.
OPERATIONS = {"T4": 65e12, "L4": 121e12, "A100": 312e12, "H100": 989e12}
SAVED_OUTPUT = 20e9
# Number of GPUs, bytes of each and number of CPUs on the accelerators that Kaggle offers, by Kaggle's name.
ACCELERATORS: dict[str, tuple[int, float, float]] = {
    "NvidiaTeslaT4": (2, 15e9, 4),
    "NvidiaTeslaT4Highmem": (2, 15e9, math.inf),
    "NvidiaL4": (4, 22e9, math.inf),
    "NvidiaL4X1": (1, 22e9, math.inf),
    "NvidiaTeslaA100": (1, 40e9, math.inf),
    "NvidiaH100": (1, 80e9, math.inf),
    "NvidiaRtxPro6000": (1, 96e9, math.inf),
}
# Patches that a CPU prepares for training in a second: measured on an AMD EPYC, see benchmarks/RESULTS.md.
LOADED_PER_CPU = 3_000


def kaggle_machine(accelerator: str, hours: float) -> Machine:
    """Return what a Kaggle session of `hours` on `accelerator`, one of `ACCELERATORS`, may use."""
    gpus, memory, cpus = ACCELERATORS[accelerator]
    return Machine(gpus, memory, _operations(accelerator), SAVED_OUTPUT, hours, cpus)


def this_machine(hours: float) -> Machine:
    """Return this machine with its GPUs, in a Kaggle session of `hours`."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return Machine(torch.cuda.device_count(), memory, _operations(torch.cuda.get_device_name()), SAVED_OUTPUT, hours)


def _operations(name: str) -> float:
    return next((rate for part, rate in OPERATIONS.items() if part in name), math.inf)


@dataclass(frozen=True, slots=True)
class Size:
    """What a net costs, measured on a CPU.

    Attributes:
        parameters: Number of parameters.
        trained: Number of those that are trained.
        macs: Multiply-accumulate operations of a forward pass of one patch.
        activations: Bytes that autograd keeps of one patch in fp32.
        largest: Bytes of the largest output of a layer for one patch in fp32.
    """

    parameters: int
    trained: int
    macs: int
    activations: int
    largest: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run needs.

    Attributes:
        memory: Bytes of a GPU.
        output: Bytes that are saved.
        hours: Lower bound of the duration on all GPUs.
        least_hours: Lower bound of the part that a session must finish: a fold, or the whole of a probe.
    """

    memory: float
    output: float
    hours: float
    least_hours: float

    def __str__(self) -> str:
        memory, output = self.memory / 1e9, self.output / 1e9
        return f"needs about {memory:.1f} GB of a GPU's memory, {output:.1f} GB of output and at least {self.hours:.1f} h"


def measure(config: Config) -> Size:
    """Return the size of the net of `config`, created with random weights.

    Raises:
        UserError: As `create`.
    """
    net = create(config, weights=False)
    parameters = list(net.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    count = sum(p.numel() for p in parameters)
    operations, largest = macs(net, config.side), _largest_output(net, config.side)
    return Size(count, trained, operations, _kept_bytes(net.train(), config.side), largest)


def needs(config: Config, size: Size, train_patches: int, test_patches: int, machine: Machine) -> Needs:
    """Return what the folds of `config` need.

    Args:
        config: Config of the run.
        size: Size of its net.
        train_patches: Number of labelled patches.
        test_patches: Number of test patches.
        machine: What it runs on.
    """
    rate = machine.operations * REACHED_SHARE / 2
    read = READ_BYTES * size.parameters
    predicted = read + PREDICT_BATCH * HELD_LAYERS * size.largest * ACTIVATION_SHARE
    if config.probe:
        passes = (train_patches + test_patches) * config.tta + 2 * NORM_PATCHES
        hours = passes * size.macs / rate / 3600 / machine.gpus
        return Needs(predicted, 0, hours, hours)
    valid = train_patches / config.n_splits
    trained = (train_patches - valid) * config.epochs * (1 + 2 * (1 - config.freeze))
    scored = valid * config.epochs + (valid + test_patches) * (config.tta + (config.norm == "test"))
    memory = read + TRAINED_BYTES * size.trained + config.batch_size * size.activations * ACTIVATION_SHARE
    output = SAVED_BYTES * size.trained * config.n_splits
    loaded = (train_patches - valid) * config.epochs / (machine.cpus * LOADED_PER_CPU / machine.gpus)
    fold_hours = max((trained + scored) * size.macs / rate, loaded) / 3600
    return Needs(max(memory, predicted), output, fold_hours * config.n_splits / machine.gpus, fold_hours)


def check_capacity(configs: list[Config], train_patches: int, test_patches: int, machine: Machine) -> Needs:
    """Return what the runs of `configs`, one after the other, need of `machine`.

    Raises:
        UserError: A run does not fit into a GPU's memory, the output or, with at least one of its folds, the hours; the message
            names the settings that make it fit, if any do.
    """
    share = replace(machine, output=machine.output / len(configs))
    found = []
    for config in configs:
        size = measure(config)
        need = needs(config, size, train_patches, test_patches, machine)
        found.append(need)
        if excess := _excess(need, share):
            fitting = (
                changes
                for changes in _candidates(config)
                if not _excess(needs(*_changed(config, changes, size), train_patches, test_patches, machine), share)
            )
            changes = next(fitting, None)
            advice = f"use {' and '.join(f'--set {change}' for change in changes)}" if changes else "use a smaller net"
            raise UserError(f"{config.model}: needs {excess}; {advice}")
    return Needs(
        memory=max(need.memory for need in found),
        output=sum(need.output for need in found),
        hours=sum(need.hours for need in found),
        least_hours=max(need.least_hours for need in found),
    )


def _excess(need: Needs, machine: Machine) -> str:
    """Return what of `need` exceeds `machine`, as text; empty if it fits."""
    if need.memory > machine.memory * MEMORY_SHARE:
        return f"{need.memory / 1e9:.0f} GB of a GPU's memory, which has {machine.memory / 1e9:.0f}"
    if need.output > machine.output:
        return f"{need.output / 1e9:.0f} GB of output, of which {machine.output / 1e9:.0f} are saved"
    if need.least_hours > machine.hours:
        return f"at least {need.least_hours:.1f} h for a fold or a probe, in a session of {machine.hours:g}"
    return ""


def _candidates(config: Config) -> Iterator[list[str]]:
    """Yield changes to `config` that make it need less, the mildest first."""
    batch = config.batch_size // 2
    while batch >= 8:
        yield [f"batch_size={batch}"]
        batch //= 2
    if config.model == "cnn":
        return
    least = f"batch_size={min(16, config.batch_size)}"
    yield ["grad_checkpointing=true", least]
    if not config.weights:
        return
    for fraction in (0.5, 0.75, 0.9):
        if fraction > config.freeze:
            yield [f"freeze={fraction}", least]
    if not config.teacher:
        yield [*PROBE]
        yield [*PROBE, "tta=1"]


def _changed(config: Config, changes: list[str], size: Size) -> tuple[Config, Size]:
    """Return `config` with `changes`, and the size of its net, estimated from that without them."""
    changed = config.changed(changes)
    thawed = (1 - changed.freeze) / max(1 - config.freeze, 1e-9)
    kept = CHECKPOINTED_SHARE if changed.grad_checkpointing and not config.grad_checkpointing else 1.0
    return changed, replace(size, trained=int(size.trained * thawed), activations=int(size.activations * thawed * kept))


def _kept_bytes(net: nn.Module, side: int) -> int:
    """Return the bytes per patch that autograd keeps for the backward pass of `net`, without its parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Batch norms need two patches; holding the output keeps the counted memory from being used twice.
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = net(torch.rand(2, 3, side, side))
    del output
    return sum(kept.values()) // 2


def _largest_output(net: nn.Module, side: int) -> int:
    """Return the bytes per patch of the largest output of a module of `net`, in evaluation mode."""
    sizes = [0]

    def count(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    with torch.no_grad():
        net(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return max(sizes)
