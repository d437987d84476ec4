"""The demo follows the competition's label rule and is the same every time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pcam_kaggle.core.experiments import QUICK, experiment
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import CENTRE, draw_patch, make_demo, tumour_place
from pcam_kaggle.data.folds import Scheme, make_folds
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.learner import load_best
from pcam_kaggle.training.task import Task
from pcam_kaggle.training.train import train_fold


def test_the_demo_is_a_set_like_kaggles(tmp_path: Path) -> None:
    data, again = Data(tmp_path / "demo"), Data(tmp_path / "again")
    assert [make_demo(data), make_demo(data), make_demo(again)] == [True, False, True]
    assert len({prepare(each, each.root.with_suffix(".store"))[0].train_sha256 for each in (data, again)}) == 1
    assert 0.25 < pd.read_csv(data.labels)["label"].mean() < 0.5
    assert data.slides() is not None


def test_tumour_decides_only_in_the_centre() -> None:
    outside = 0
    for number in range(100):
        rng = np.random.default_rng(number)
        place = tumour_place(rng)
        _, tumour = draw_patch(rng, np.random.default_rng(0), place)
        assert tumour.any() == (place is not None)
        outside += bool(tumour.any() and not tumour[CENTRE, CENTRE].any())
    assert outside > 10


def test_slides_differ_in_stain() -> None:
    def mean_colour(slide: int, number: int) -> np.ndarray:
        return draw_patch(np.random.default_rng(number), np.random.default_rng(slide), None)[0].mean((0, 1))

    within = np.ptp([mean_colour(0, number) for number in range(8)], axis=0).max()
    between = np.ptp([mean_colour(slide, 0) for slide in range(8)], axis=0).max()
    assert between > 2 * within


def pair(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a patch with its tumour in the centre, and one of the same slide with it near the edge."""
    inside, outside = (40 + number % 16, 55 - number % 16), [(8, 8), (8, 48), (48, 88), (88, 20)][number % 4]
    drawn = [draw_patch(np.random.default_rng(number), np.random.default_rng((1, number % 10)), at) for at in (inside, outside)]
    assert [bool(tumour[CENTRE, CENTRE].any()) for _, tumour in drawn] == [True, False]
    return drawn[0][0], drawn[1][0]


@pytest.mark.slow
def test_a_trained_quick_net_knows_that_the_centre_decides(tmp_path: Path) -> None:
    data, backend = Data(tmp_path / "demo"), Backend("cpu", "fp32", "channels_last")
    make_demo(data)
    prepare(data, tmp_path / "store")
    folds = make_folds(read_labels(data.labels), Scheme(3, "stratified"), None, tmp_path / "folds")[0]
    # Twenty epochs of the demo are still fewer steps than the experiment takes on real patches.
    config = replace(experiment(QUICK).config, n_splits=3, epochs=20, batch_size=32)
    task = Task(Run(tmp_path), QUICK, config, PatchStore(tmp_path / "store"), folds)
    list(train_fold(task, 0, backend))
    net = load_best(task.run.fold(0), config, backend)
    pairs = torch.from_numpy(np.array([pair(number) for number in range(60)]))
    with torch.inference_mode():
        logits = torch.stack([net(backend.images(patches)) for patches in pairs.unbind(1)]).double().numpy()
    assert auc(np.repeat([1, 0], 60), logits.ravel()) >= 0.9
