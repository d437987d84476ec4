"""Pictures and the result of a session, as the notebooks show them."""

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report.gallery import Gallery, augmented, curves, draw_examples, patch_gallery, worst_mistakes
from pcam_kaggle.report.summary import summary
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.tables import score_lines
from pcam_kaggle.training.loader import TrainBatches

TABLE = pd.DataFrame({"id": list("abcdef"), "label": [1, 0, 1, 0, 1, 0], "fold": [0, 0, 0, 1, 1, 1]})
TABLE["probability"] = [0.9, 0.8, 0.2, 0.1, 0.2, 0.8]


def pictures(gallery: Gallery) -> dict[str, np.ndarray]:
    """Return the pictures in the HTML of `gallery`, uint8 (h, w, 3), by their text alternatives."""
    found = re.findall(r'<img alt="(.*?)" .*?src="data:image/png;base64,(.*?)">', gallery._repr_html_())
    return {name: cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR) for name, data in found}


def test_examples_are_of_both_labels_and_those_with_tumour_come_first() -> None:
    labels = pd.DataFrame({"id": [f"{n:02d}" for n in range(30)], "label": [int(n < 5) for n in range(30)]})
    drawn = draw_examples(labels, 8)
    assert drawn["label"].tolist() == [1] * 5 + [0] * 8
    assert drawn["id"].is_unique
    assert drawn.equals(draw_examples(labels, 8))


def test_the_worst_mistakes_are_the_lowest_positives_and_the_highest_negatives() -> None:
    assert worst_mistakes(TABLE, 2)["id"].tolist() == ["c", "e", "f", "b"]
    assert worst_mistakes(TABLE)["id"].tolist() == ["c", "e", "a", "f", "b", "d"]


def test_patches_are_shown_by_label_with_the_labelled_centre() -> None:
    # The patches are grey, so black and white pixels are the mark.
    patches = np.full((6, 96, 96, 3), 128, np.uint8)
    shown = pictures(patch_gallery(patches, TABLE["label"]))
    assert list(shown) == ["Tumour in the centre", "No tumour in the centre"]
    for picture in shown.values():
        # The first patch, without its edges.
        is_grey = (picture[:, : picture.shape[1] // 4] == 128).all(axis=2)
        rows, columns = (is_grey.any(axis=axis).nonzero()[0] for axis in (1, 0))
        tile = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, 0]
        assert abs(tile.shape[0] - tile.shape[1]) <= 2
        for axis in (0, 1):
            marked = (tile == 0).any(axis=axis).nonzero()[0]
            ends = np.array([marked[0], marked[-1] + 1]) * 96 / tile.shape[1 - axis]
            assert np.abs(ends - [32, 64]).max() < 2
    plain = pictures(patch_gallery(patches, TABLE["label"], marked=False))
    assert (shown["Tumour in the centre"] != plain["Tumour in the centre"]).any()
    assert not (plain["Tumour in the centre"][60:] == 0).any()


def test_each_title_is_above_the_patches_of_its_label() -> None:
    patches = np.stack([np.full((64, 64, 3), 50 if label else 200, np.uint8) for label in TABLE["label"]])
    gallery = patch_gallery(patches, TABLE["label"], TABLE["probability"], titles=("one", "zero"), marked=False)
    shown = pictures(gallery)
    values = {name: [value for value in (50, 200) if (shown[name] == value).mean() > 0.2] for name in shown}
    assert values == {"one": [50], "zero": [200]}
    titles = [[ax.get_title() for ax in plot.figure.axes if ax.get_title()] for plot in gallery.plots]
    assert titles == [["0.900", "0.200", "0.200"], ["0.800", "0.100", "0.800"]]
    # No picture is wider than the window.
    markup = gallery._repr_html_()
    assert markup.count("max-width: 98%") == markup.count("margin: 0 1%") == markup.count("<img") == 2
    assert len(patch_gallery(patches, TABLE["label"] * 0).plots) == 1


def test_augmented_patches_are_those_of_training(store: PatchStore) -> None:
    config = Config(side=64, batch_size=8, n_splits=3)
    augment = TrainBatches(store, np.arange(8), np.zeros(8), config, fold=0).augment
    patches = store.images(np.arange(8))
    shown = augmented(patches, config)
    augment.set_random_seed(config.seed)
    expected = np.stack([augment(image=patch)["image"] for patch in patches])
    assert (shown == expected).all()
    assert shown.shape == (8, 64, 64, 3)


def test_curves_are_those_of_the_report() -> None:
    log = pd.DataFrame({"epoch": [1.0, 2.0], "train_loss": [0.5, 0.4], "valid_auc": [0.6, 0.7]})
    gallery = curves({"one": {0: log, 1: log}, "probe": {}, "two": {0: log}}, TABLE)
    assert list(pictures(gallery)) == ["Learning curves of one", "Learning curves of two", "ROC curves"]
    assert len(gallery.plots[0].figure.axes[0].lines) == 3
    assert "<figcaption>Out of fold: pooled AUC 0.5556. Line: mean over folds. Band: range" in gallery._repr_html_()


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
