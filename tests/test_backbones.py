"""timm's nets by name, without a network."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcam_kaggle.backbones import create
from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError

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
