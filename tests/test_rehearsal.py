"""A rehearsal: the real step and batch, random numbers as before, and one line for a model that is too large."""

from pathlib import Path

import pytest
import torch

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.weights import import_timm
from pcam_kaggle.training import train as training
from pcam_kaggle.training.learner import Learner
from pcam_kaggle.training.train import rehearse

TRAINED = Config(n_blocks=2, width=8, side=32, batch_size=16, precision="fp32")


@pytest.fixture
def probed(tmp_path: Path) -> Config:
    torch.save(import_timm().create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    model = {"model": "timm:resnet10t", "weights": str(tmp_path / "weights.pth"), "freeze": 1, "probe": True}
    return Config(**model, side=32, tta=1, precision="fp32")


def test_a_rehearsal_takes_the_real_step_and_batch_and_changes_no_random_number(
    probed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, ...]] = []
    compute, predict, features = Learner.compute, training.predict_logits, training.mean_features
    monkeypatch.setattr(Learner, "compute", lambda learner: taken.append(learner.patches.shape) or compute(learner))
    monkeypatch.setattr(training, "predict_logits", lambda *given: taken.append(predict(*given).shape))
    monkeypatch.setattr(training, "mean_features", lambda *given: taken.append(features(*given).shape))
    before = torch.get_rng_state()
    rehearse(TRAINED)
    rehearse(probed)
    assert taken == [(16, 32, 32, 3), (1, 256), (256, 512)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("owner", "name", "setting"),
    [
        (Learner, "step", "batch_size=16"),
        (training, "predict_logits", "model=cnn"),
        (training, "mean_features", "model=timm:resnet10t"),
    ],
)
def test_a_model_that_is_too_large_fails_in_one_line(
    owner: object, name: str, setting: str, probed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(UserError, match=f"^{setting}: too large for the device's memory; use a smaller one$"):
        rehearse(probed if name == "mean_features" else TRAINED)
