"""The demo follows the competition's label rule and is the same every time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pcam_kaggle.core.experiments import QUICK, experiment
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import CENTRE, draw_patch, make_demo, tumour_place
from pcam_kaggle.data.folds import Scheme, make_folds
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.device import Backend
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


@pytest.mark.slow
def test_a_trained_quick_net_knows_that_the_centre_decides(tmp_path: Path) -> None:
    data = Data(tmp_path / "demo")
    make_demo(data)
    prepare(data, tmp_path / "store")
    folds = make_folds(read_labels(data.labels), Scheme(3, "stratified"), None, tmp_path / "folds")[0]
    # Twenty epochs of the demo are still fewer steps than the experiment takes on real patches.
    config = replace(experiment(QUICK).config, n_splits=3, epochs=20, batch_size=32)
    task = Task(Run(tmp_path), QUICK, config, PatchStore(tmp_path / "store"), folds)
    list(train_fold(task, 0, Backend("cpu", "fp32", "channels_last")))
    # Half of the negative patches have tumour elsewhere: by tumour anywhere, the AUC would be 0.74.
    assert task.run.fold(0).metrics().valid_auc >= 0.9
