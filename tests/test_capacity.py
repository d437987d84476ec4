"""What a run needs of a machine, estimated before it starts."""

from dataclasses import replace

import pytest
import torch

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import EXPERIMENTS
from pcam_kaggle.training import capacity
from pcam_kaggle.training.capacity import Size, check_capacity, kaggle_machine, measure, needs

FULL = (220_025, 57_458)
KAGGLE_T4 = kaggle_machine("NvidiaTeslaT4", 12.0)
# A transformer of a billion parameters at 224 px.
HUGE = Size(parameters=1_134_774_272, trained=1_134_774_272, macs=295_000_000_000, activations=2_000_000_000, largest=8_421_376)
ENCODER = Config(model="timm:vit_giant_patch14_reg4_dinov2", weights="folder", resize=224)


@pytest.mark.parametrize("name", [name for name, chosen in EXPERIMENTS.items() if not chosen.members])
def test_every_experiment_fits_into_a_session(name: str) -> None:
    assert "GB of output" in str(check_capacity([EXPERIMENTS[name].config], *FULL, KAGGLE_T4))


def refusal(monkeypatch: pytest.MonkeyPatch, config: Config, size: Size, **limits: float) -> str:
    """Return the message with which `config` is refused on two T4 with other limits."""
    monkeypatch.setattr(capacity, "measure", lambda config: size)
    with pytest.raises(UserError) as caught:
        check_capacity([config], *FULL, replace(KAGGLE_T4, **limits))
    return str(caught.value)


def test_a_huge_net_becomes_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, ENCODER, HUGE)
    assert "GB of a GPU's memory, which has 15" in message
    assert message.endswith("; use --set freeze=1 and --set optimizer=logistic and --set norm=train")
    probe = replace(ENCODER, freeze=1, optimizer="logistic")
    # 277,483 patches in four views and twice 8,192 for batch norms, at half of two GPUs' 32.5 T multiply-accumulates.
    hours = (4 * 277_483 + 2 * 8192) * 295e9 / (2 * 16.25e12) / 3600
    assert f"at least {hours:.1f} h" in str(check_capacity([probe], *FULL, KAGGLE_T4))


@pytest.mark.parametrize(
    ("limits", "config", "excess", "advice"),
    [
        ({"memory": 3e9}, Config(batch_size=256), "GB of a GPU's memory", "--set batch_size=128"),
        ({"output": 1e9}, replace(ENCODER, model="timm:resnet10t"), "of which 1 are saved", "--set freeze=0.5"),
        ({"hours": 0.2}, replace(ENCODER, epochs=500), "h for a fold or a probe", "--set optimizer=logistic"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    limits: dict[str, float], config: Config, excess: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Size(parameters=15_000_000, trained=15_000_000, macs=500_000_000, activations=20_000_000, largest=1_000_000)
    message = refusal(monkeypatch, config, size, **limits)
    assert excess in message
    assert advice in message
    changes = message.partition("use --set ")[2].split(" and --set ")
    changed = config.changed(changes)
    thawed = int(size.trained * (1 - changed.freeze))
    monkeypatch.setattr(capacity, "measure", lambda config: replace(size, trained=thawed))
    check_capacity([changed], *FULL, replace(KAGGLE_T4, **limits))


def test_activations_are_those_that_autograd_keeps() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Sigmoid(), torch.nn.Flatten())
    # The input of the convolution, and the output of the sigmoid; the flattened maps are the same memory.
    assert capacity._kept_bytes(net, 32) == 4 * (3 * 32 * 32 + 4 * 30 * 30)
    assert capacity._largest_output(net, 32) == 4 * 4 * 30 * 30


def test_frozen_layers_need_less() -> None:
    free = measure(Config(model="timm:resnet10t"))
    frozen = measure(Config(model="timm:resnet10t", weights="unused", freeze=0.5))
    assert free.macs == frozen.macs
    assert frozen.trained < free.trained == free.parameters
    assert frozen.activations < 0.7 * free.activations


def test_more_folds_write_more() -> None:
    config, size = Config(), Size(10**6, 10**6, 10**6, 10**6, 10**5)
    of = [needs(replace(config, n_splits=n), size, *FULL, KAGGLE_T4).output for n in (5, 10)]
    assert of[1] == 2 * of[0]
