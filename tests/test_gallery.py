"""Pictures and the result of a session, as the notebooks show them."""

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report.gallery import augmentation_tiles, augmented, draw_examples, patch_tiles, worst_mistakes
from pcam_kaggle.report.summary import summary
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.tables import score_lines
from pcam_kaggle.training.loader import TrainBatches

TABLE = pd.DataFrame({"id": list("abcdef"), "label": [1, 0, 1, 0, 1, 0], "fold": [0, 0, 0, 1, 1, 1]})
TABLE["probability"] = [0.9, 0.8, 0.2, 0.1, 0.2, 0.8]


def pictures(markup: str) -> list[np.ndarray]:
    """Return the JPEGs in the HTML `markup`, uint8 (h, w, 3)."""
    found = re.findall(r'<img src="data:image/jpeg;base64,(.*?)"', markup)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR) for data in found]


def test_examples_are_of_both_labels_and_those_with_tumour_come_first() -> None:
    labels = pd.DataFrame({"id": [f"{n:02d}" for n in range(30)], "label": [int(n < 5) for n in range(30)]})
    drawn = draw_examples(labels, 8)
    assert drawn["label"].tolist() == [1] * 5 + [0] * 8
    assert drawn["id"].is_unique
    assert drawn.equals(draw_examples(labels, 8))


def test_the_worst_mistakes_are_the_lowest_positives_and_the_highest_negatives() -> None:
    assert worst_mistakes(TABLE, 2)["id"].tolist() == ["c", "e", "f", "b"]
    assert worst_mistakes(TABLE)["id"].tolist() == ["c", "e", "a", "f", "b", "d"]


def test_patches_are_shown_under_the_heading_of_their_label_with_the_labelled_centre() -> None:
    patches = np.stack([np.full((96, 96, 3), 80 if label else 180, np.uint8) for label in TABLE["label"]])
    shown = patch_tiles(patches, TABLE, ("one", "zero"), side=192)
    one, zero = shown.split("<h3>zero</h3>")
    for part, level in ((one, 80), (zero, 180)):
        for picture in pictures(part):
            assert picture.shape == (192, 192, 3)
            assert picture[20, 20, 0] == picture[96, 96, 0] == level
            for axis in (0, 1):
                marked = (picture[..., 0] < 40).any(axis=axis).nonzero()[0]
                assert np.abs(marked[[0, -1]] - [64, 127]).max() <= 2
    captions = [re.findall("<figcaption>(.*?)</figcaption>", part) for part in (one, zero)]
    assert captions[0] == ["a, fold 0, probability 0.9000", "c, fold 0, probability 0.2000", "e, fold 1, probability 0.2000"]
    assert [caption[0] for caption in captions[1]] == ["b", "d", "f"]
    assert shown._repr_html_().count("max-width: 100%") == shown.count("<img") == 6
    assert "<h3>one" not in patch_tiles(patches[:1], pd.DataFrame({"id": ["<b>"], "label": [0]}), ("one", "zero"))
    assert "<b>" not in patch_tiles(patches[:1], pd.DataFrame({"id": ["<b>"], "label": [0]}))


def test_versions_are_beside_their_patch_without_a_mark() -> None:
    patches = np.full((2, 96, 96, 3), 128, np.uint8)
    shown = augmentation_tiles(patches, TABLE[:2], Config(side=64, stain_jitter=0, color_jitter=0))
    assert [len(pictures(tile)) for tile in shown.split("<figure ")[1:]] == [6, 6]
    assert [(picture == 128).all() for picture in pictures(shown)] == 2 * [False, *5 * [True]]


def test_augmented_patches_are_those_of_training(store: PatchStore) -> None:
    config = Config(side=64, batch_size=8, n_splits=3)
    augment = TrainBatches(store, np.arange(8), np.zeros(8), config, fold=0).augment
    patches = store.images(np.arange(8))
    shown = augmented(patches, config)
    augment.set_random_seed(config.seed)
    expected = np.stack([augment(image=patch)["image"] for patch in patches])
    assert (shown == expected).all()
    assert shown.shape == (8, 64, 64, 3)


def test_the_summary_names_scores_and_the_next_step(finished_run: Path) -> None:
    run = Run(finished_run / "runs" / "bottleneck")
    text = summary([run], [run])
    assert text.splitlines()[0] == f"**`{run.name}`**"
    assert all(f"- {line}\n" in text for line in score_lines(run.blend_metrics()))
    assert "python -m pcam_kaggle kaggle fetch" in text
    run.blend_metrics().model_copy(update={"missing_folds": [3]}).write(run.folder / "metrics.json")
    text = summary([run], [run, Run(finished_run / "runs" / "other")])
    assert "- missing: folds 3\n" in text
    assert "not finished in time: fold 3, run `other`. To train the rest, attach this notebook's output" in text
    assert "kaggle fetch" not in text
    assert "no fold was finished in time; attach" in summary([], [run])
