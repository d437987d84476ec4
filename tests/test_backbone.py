"""Backbones of timm: input size, weights in Hugging Face's layout, frozen layers, pooling."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.backbone import copy_trained, enlarge, trained_state
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import import_timm, weights_file
from pcam_kaggle.pipeline.weights_folder import with_folder_settings
from pcam_kaggle.training.optim import parameter_groups
from pcam_kaggle.training.schedule import MovingAverage

Arguments = dict[str, Any]
# A transformer with registers, SwiGLU and LayerScale, small enough for a test.
ENCODER = "vit_giant_patch14_reg4_dinov2"
SMALL = {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 6.0}
MEAN, STD = (0.7, 0.57, 0.72), (0.19, 0.23, 0.18)
RESNET, VIT = Config(model="timm:resnet10t"), Config(model="timm:vit_tiny_patch16_224")

# One of each of timm's kinds of models, and the side that those of a fixed input size enlarge the patch to.
ANY_SIZE = "tf_efficientnetv2_b0 convnext_atto mobilenetv3_small_050 regnetx_002 densenet121 repvit_m0_9 tiny_vit_5m_224"
SIDE_224 = (
    "vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 "
    "eva02_tiny_patch14_224 coatnet_pico_rw_224 levit_128s mixer_s32_224 xcit_nano_12_p16_224"
)
FAMILIES = {
    **dict.fromkeys([*ANY_SIZE.split(), "poolformer_s12", "resnet10t"], 0),
    **dict.fromkeys(SIDE_224.split(), 224),
    "maxvit_rmlp_pico_rw_256": 256,
    "crossvit_tiny_240": 240,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_predicts(name: str, pcam: Callable[..., Any]) -> None:
    fields = [f"model=timm:{name}", "epochs=1", "side=96", "tta=1", "batch_size=12"]
    status, out, err = pcam("pipeline", "--folds", "0", *(part for field in fields for part in ("--set", field)))
    assert status == 0, err
    assert "12 out of fold, 7 test" in out


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s", "resnet10t"])
def test_a_model_of_a_fixed_size_gets_its_size(name: str) -> None:
    seen = []
    net = create(Config(model=f"timm:{name}"))
    net.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    net.eval()(torch.rand(1, 3, 96, 96))
    assert seen == [FAMILIES[name] or 96]


def test_enlarging_is_pillows_bicubic_interpolation() -> None:
    # Without black and white, which Pillow clips after each of its two passes, and rounds to integers.
    patch = np.random.default_rng(0).integers(60, 200, (96, 96, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(patch).resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255
    image = torch.from_numpy(patch).permute(2, 0, 1)[None].float() / 255
    with torch.autocast("cpu", torch.bfloat16):
        ours = enlarge(image, 224)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours[0].permute(1, 2, 0).numpy(), theirs, atol=2 / 255)
    assert enlarge(image, 0) is image


def hub_folder(folder: Path) -> None:
    """Save a small encoder in Hugging Face's layout as timm does."""
    timm = import_timm()
    torch.manual_seed(1)
    net = timm.create_model(ENCODER, num_classes=0, **SMALL)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net.pretrained_cfg.update(mean=MEAN, std=STD, input_size=(3, 56, 56))
    timm.models.save_for_hf(net, str(folder), model_args=SMALL, safe_serialization=True)


def config_of(*assignments: str) -> Config:
    return Config().changed(with_folder_settings([*assignments]))


def test_a_folder_below_home_gives_timms_own_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_folder(tmp_path / "encoder")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of("weights=~/encoder")
    assert (config.model, config.resize) == (f"timm:{ENCODER}", 56)
    net = create(config).eval()
    theirs = import_timm().create_model(f"local-dir:{tmp_path}/encoder", pretrained=True, num_classes=1).eval()
    theirs.head.load_state_dict(net.classifier().state_dict())
    images = torch.rand(3, 3, 96, 96)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    with torch.no_grad():
        expected = theirs((enlarge(images, 56) - mean) / std).squeeze(1)
        torch.testing.assert_close(net(images), expected, atol=1e-5, rtol=0)
    # What the run stores is enough without the folder.
    again = create(config, weights=False).eval()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(images), expected, atol=1e-5, rtol=0)


def test_what_is_assigned_precedes_the_folder(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    config = config_of(f"weights={tmp_path}", "resize=112", 'model_args={"drop_path_rate": 0.1}')
    arguments = json.loads(config.model_args)
    assert (config.resize, arguments["drop_path_rate"], arguments["embed_dim"]) == (112, 0.1, 32)
    # No position for the class token and the registers.
    assert create(config).net.pos_embed.shape[1] == 8 * 8


@pytest.mark.parametrize(
    ("made", "wanted", "problem"),
    [
        ({"patch_size": 16}, {"patch_size": 14}, r"another shape: 1 \(patch_embed.proj.weight \(32, 3, 16, 16\) for"),
        ({"init_values": 1e-5}, {}, r"without a place in the model: 4 \(blocks.0.ls1.gamma, "),
        ({}, {"reg_tokens": 4}, r"not filled: 1 \(reg_token\)"),
    ],
)
def test_what_another_architecture_lacks_is_named(made: Arguments, wanted: Arguments, problem: str, tmp_path: Path) -> None:
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 112}
    torch.save(import_timm().create_model("vit_tiny_patch16_224", **small | made).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"does not fit timm:vit_tiny_patch16_224; tensors .*{problem}"):
        create(replace(VIT, weights=str(tmp_path / "weights.pth"), model_args=json.dumps(small | wanted)))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"architecture": None}, "architecture"),
        ({"model_args": []}, "model_args"),
        ({"mean": 3}, "mean"),
        ({"pretrained_cfg": {"input_size": 224}}, "pretrained_cfg.input_size"),
    ],
)
def test_a_folders_settings_of_another_type_are_named(wrong: Arguments, field: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": ENCODER} | wrong))
    with pytest.raises(UserError, match=f"config.json: {field}: .*; correct it"):
        config_of(f"weights={tmp_path}")


def test_a_file_whose_names_timm_converts_is_complete(tmp_path: Path) -> None:
    state = import_timm().create_model("vit_tiny_patch16_224").state_dict()
    torch.save({f"visual.trunk.{name}": value for name, value in state.items()}, tmp_path / "weights.pth")
    net = create(replace(VIT, weights=str(tmp_path / "weights.pth")))
    assert torch.equal(net.net.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])


def test_a_folder_holds_one_config_that_names_a_model_and_one_file_of_weights(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architectures": ["Dinov2Model"]}')
    with pytest.raises(UserError, match=r"must hold one config.json, but holds one/config.json, two/config.json"):
        with_folder_settings([f"weights={tmp_path}"])
    with pytest.raises(UserError, match=r"config.json: names no architecture, so it is not timm's; add --set model=timm:NAME"):
        with_folder_settings([f"weights={tmp_path / 'one'}"])
    assignments = [f"weights={tmp_path / 'one'}", "model=timm:resnet10t"]
    assert with_folder_settings(assignments) == assignments
    with pytest.raises(UserError, match=r"must hold one file of weights, but holds no .safetensors"):
        weights_file("resnet10t", str(tmp_path))
    for name in ("slide_encoder.pth", "other.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds other.safetensors, slide_encoder.pth; set weights to the path of one"):
        weights_file("resnet10t", str(tmp_path))
    # Names of Hugging Face have precedence.
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert weights_file("resnet10t", str(tmp_path)) == tmp_path / name


def test_an_unknown_normalisation_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(import_timm().create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    config = replace(RESNET, weights=str(tmp_path / "weights.pth"))
    create(config)
    assert "does not say which mean and std it expects" in caplog.text
    caplog.clear()
    net = create(replace(config, model_args=json.dumps({"mean": MEAN, "std": STD})))
    assert not caplog.text
    torch.testing.assert_close(net.normalize.mean.flatten(), torch.tensor(MEAN))


def frozen(fraction: float, name: str = "resnet10t") -> Any:
    return create(Config(model=f"timm:{name}", weights="unused", freeze=fraction), weights=False)


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_frozen_layers_keep_weights_and_statistics(name: str) -> None:
    net = frozen(0.5, name)
    ema = copy_trained(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        net.train()(torch.rand(4, 3, 96, 96)).square().mean().backward()
        optimizer.step()
        MovingAverage(ema, net).update(torch.tensor(0.5))
    after, averaged = net.state_dict(), ema.state_dict()
    trained = trained_state(net).keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} <= trained
    assert 0 < len(trained) < len(before)
    assert not any(key.startswith(("net.conv1", "net.conv_stem", "net.patch_embed")) for key in trained)
    # The EMA shares what is frozen, and nothing else.
    shared = {key for key in after if after[key].data_ptr() == averaged[key].data_ptr()}
    assert shared == before.keys() - trained


def test_frozen_layers_are_outside_of_autograd() -> None:
    net, recorded = frozen(1.0), []
    for module in net.net.modules():
        module.register_forward_hook(lambda module, inputs, output: recorded.append((module, output.requires_grad)))
    net.train()(torch.rand(2, 3, 96, 96))
    assert [module for module, requires_grad in recorded if requires_grad] == [net.classifier(), net.net]
    assert all(not module.training for module in net.net.modules() if isinstance(module, nn.BatchNorm2d))


def test_the_fraction_counts_layers_in_a_known_order() -> None:
    counts = [len(frozen(fraction).frozen) for fraction in (0.01, 0.25, 0.5, 1.0)]
    assert 0 == counts[0] < counts[1] < counts[2] < counts[3]
    assert trained_state(frozen(1.0)).keys() == {"net.fc.weight", "net.fc.bias"}
    with pytest.raises(UserError, match=r"freeze=0.5: timm does not know the order"):
        frozen(0.5, "poolformer_s12")


def test_on_a_cpu_a_training_step_does_not_fuse_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = copy_trained(create(replace(VIT, dropout=0.0), weights=False)), torch.rand(2, 3, 96, 96)
    fused = model.eval()(images)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("fused"))
    assert torch.allclose(fused, model.train()(images), atol=1e-5)
    with pytest.raises(pytest.fail.Exception):
        model.eval()(images)


def test_pooling_is_that_of_the_config() -> None:
    assert create(replace(RESNET, pool="catavgmax")).features(torch.rand(2, 3, 96, 96)).shape == (2, 1024)
    with pytest.raises(UserError, match=r"pool=catavgmax: "):
        create(replace(VIT, pool="catavgmax"))


def test_a_layer_learns_slower_than_the_one_above_it() -> None:
    net = create(replace(VIT, layer_decay=0.8))
    scales = {id(p): group["lr_scale"] for group in parameter_groups(net, 0.8) for p in group["params"]}
    blocks = [scales[id(block.mlp.fc1.weight)] for block in net.net.blocks]
    np.testing.assert_allclose(np.divide(blocks[:-1], blocks[1:]), 0.8)
    assert scales[id(net.classifier().weight)] == 1
    # Positions do not decay.
    [decay] = {group["weight_decay"] for group in parameter_groups(net) if any(p is net.net.pos_embed for p in group["params"])}
    assert decay == 0


def test_checkpointing_changes_no_gradient() -> None:
    images, gradients = torch.rand(2, 3, 96, 96), []
    for is_on in (False, True):
        torch.manual_seed(0)
        net = create(replace(RESNET, dropout=0.0, grad_checkpointing=is_on))
        net(images).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_arguments_are_a_json_object(text: str, tmp_path: Path) -> None:
    hub_folder(tmp_path)
    for assignments in ([f"model={RESNET.model}"], [f"weights={tmp_path}"]):
        with pytest.raises(UserError, match=r"model_args=.*must be a JSON object"):
            config_of(*assignments, f"model_args={text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Hibou-B", "H-optimus-0", "UNI", "Virchow2"])
def test_documented_commands(name: str, pcam: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text()
    found = re.search(rf"### {name}\n.*?```json\n(.*?)```\n\n```sh\npython -m pcam_kaggle (.*?)\n```", text, re.DOTALL)
    content, command = json.loads(found[1]), shlex.split(found[2])
    monkeypatch.chdir(tmp_path)
    fields = dict(part.split("=", 1) for part in command if "=" in part)
    # The weights are those of the architecture with two of its layers.
    content["model_args"]["depth"] = 2
    added = json.loads(fields.get("model_args", "{}"))
    arguments = {key: value for key, value in (content["model_args"] | added).items() if value != ""}
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = import_timm().layers.SwiGLUPacked
    net = import_timm().create_model(content["architecture"], num_classes=0, **arguments)
    folder = Path(fields["weights"])
    folder.mkdir()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(content))
    status, _, err = pcam(*command, "--set", "epochs=1", "--set", "side=96")
    assert status == 0, err
    [made] = (tmp_path / "work" / "runs").glob("*/config.json")
    assert json.loads(made.read_text())["config"]["resize"] == 224
