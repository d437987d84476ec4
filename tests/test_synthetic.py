"""The demo follows the competition's label rule and is the same every time."""

from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.patches import prepare
from pcam_kaggle.paths import Data
from pcam_kaggle.synthetic import CENTRE, draw_patch, make_demo, tumour_place


def test_the_demo_is_a_set_like_kaggles(tmp_path: Path) -> None:
    data = Data(tmp_path / "demo")
    assert make_demo(data)
    assert not make_demo(data)
    made, _ = prepare(data, tmp_path / "store")
    other, _ = prepare(data, tmp_path / "again")
    assert made["train_sha256"] == other["train_sha256"]
    labels = pd.read_csv(data.labels)["label"]
    assert 0.25 < labels.mean() < 0.5
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
