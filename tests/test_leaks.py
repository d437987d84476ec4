"""Out-of-fold predictions are free of leaks: labels and pixels of a fold do not change the net that predicts it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Outcome, sha1, write_tif

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.experiments import QUICK, experiment
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.data.folds import Scheme, make_folds
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.models.factory import create
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import score
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training import augment
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import predict_logits
from pcam_kaggle.training.predict import predict
from pcam_kaggle.training.task import Task
from pcam_kaggle.training.train import train, train_fold

CPU = Backend("cpu", "fp32", "channels_last")
SCHEME = Scheme(3, "stratified")


@pytest.fixture
def once(tiny: Config) -> Config:
    """Return a config of one epoch, so that the validation AUC selects no epoch."""
    return replace(tiny, epochs=1)


def packed(data: Data, folder: Path, config: Config) -> Task:
    """Return the task of a run in `folder / "run"`, with the store and three folds of `data`."""
    prepare(data, folder / "store")
    folds = make_folds(read_labels(data.labels), SCHEME, None, folder / "folds")[0]
    return Task(Run(folder / "run"), "tiny", config, PatchStore(folder / "store"), folds)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "best.pt", "net")["net"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_weights_do_not_see_the_labels_of_their_fold(data: Data, once: Config, tmp_path: Path) -> None:
    task = packed(data, tmp_path, once)
    table = task.folds.table
    turned = table.assign(label=table["label"].where(table["fold"] != 1, 1 - table["label"]))
    for name, labels in (("as_is", table), ("turned", turned)):
        for run, config in (("teacher", once), ("student", replace(once, teacher="teacher"))):
            own = replace(task, run=Run(tmp_path / name / run), config=config, folds=replace(task.folds, table=labels))
            own.run.open("tiny", config, task.store, task.folds)
            for fold in (0, 1):
                list(train_fold(own, fold, CPU))
    for run in ("teacher", "student"):
        nets = {name: [weights(tmp_path / name / run / f"fold_{fold}") for fold in (0, 1)] for name in ("as_is", "turned")}
        assert same(nets["as_is"][1], nets["turned"][1])
        assert not same(nets["as_is"][0], nets["turned"][0])


def test_weights_do_not_see_the_pixels_of_their_fold_nor_the_test_set(data: Data, once: Config, tmp_path: Path) -> None:
    task = packed(data, tmp_path, once)
    store, folds = task.store, task.folds
    list(train_fold(task, 1, CPU))
    valid = store.rows("train", folds.table["id"][folds.table["fold"] == 1].to_numpy())
    patches = np.load(store.folder / "patches.npy", mmap_mode="r+")
    patches[np.concatenate([valid, store.rows("test", store.ids("test"))])] ^= 255
    patches.flush()
    list(train_fold(replace(task, run=Run(tmp_path / "inverted"), store=PatchStore(store.folder)), 1, CPU))
    assert same(weights(tmp_path / "run" / "fold_1"), weights(tmp_path / "inverted" / "fold_1"))


def test_each_row_comes_from_the_one_net_that_did_not_see_it(data: Data, once: Config, tmp_path: Path) -> None:
    task = packed(data, tmp_path, once)
    train(task, [0, 1, 2])
    for fold in range(3):
        # A net whose logit is the number of its fold plus one.
        content = checkpoint.load(tmp_path / "run" / f"fold_{fold}" / "best.pt")
        last = max(key for key in content["net"] if key.startswith("head") and key.endswith("bias"))
        content["net"] = {key: torch.zeros_like(value) for key, value in content["net"].items()}
        content["net"][last] += fold + 1.0
        checkpoint.save(tmp_path / "run" / f"fold_{fold}" / "best.pt", content)
    predict(task, [0, 1, 2])
    oof = pd.concat([pd.read_csv(tmp_path / "run" / f"fold_{fold}" / "oof.csv").assign(by=fold) for fold in range(3)])
    assert sorted(oof["id"]) == sorted(task.folds.table["id"])
    logits = np.log(oof["probability"] / (1 - oof["probability"])).round().astype(int) - 1
    assert oof.assign(logit=logits).merge(task.folds.table, on="id").eval("logit == fold and by == fold").all()


def test_labels_of_the_sample_submission_are_nowhere(data: Data, once: Config, tmp_path: Path) -> None:
    written = []
    for label in (0, 1):
        pd.read_csv(data.sample).assign(label=label).to_csv(data.sample, index=False)
        work = tmp_path / str(label)
        task = packed(data, work, once)
        train(task, [0])
        predict(task, [0])
        written.append([(work / "run" / "fold_0" / name).read_bytes() for name in ("oof.csv", "test.csv")])
    assert written[0] == written[1]


@pytest.mark.slow
def test_what_can_only_be_memorised_is_not_known_out_of_fold(
    data: Data, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "MAX_SHIFT", 0)
    rng = np.random.default_rng(1)
    noise = Data(tmp_path / "noise")
    for split, count in (("train", 120), ("test", 4)):
        noise.patches(split).mkdir(parents=True)
        patches = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        for patch in patches:
            write_tif(noise.patches(split) / f"{sha1(patch)}.tif", patch)
        table = pd.DataFrame({"id": [sha1(patch) for patch in patches], "label": rng.permutation(count) % 2})
        table.to_csv(noise.labels if split == "train" else noise.sample, index=False)
    config = replace(tiny, width=16, epochs=25, stain_jitter=0.0, color_jitter=0.0, dropout=0.0, head="flatten")
    task = packed(noise, tmp_path, config)
    train(task, [0, 1, 2])
    predict(task, [0, 1, 2])
    store, folds = task.store, task.folds
    seen = folds.table[folds.table["fold"] != 0]
    net = create(config)
    net.load_state_dict(checkpoint.load(tmp_path / "run" / "fold_0" / "last.pt")["net"])
    rows = store.rows("train", seen["id"].to_numpy())
    memory = predict_logits(net.eval(), store, rows, config, CPU, 1, "")[0].double().numpy()
    assert auc(seen["label"].to_numpy(), memory) > 0.95
    assert_chance(tmp_path / "run")


def assert_chance(run: Path) -> None:
    """Fail where the pooled OOF AUC of the run in folder `run`, three folds, is not 0.5 within its interval."""
    tables = [pd.read_csv(run / f"fold_{fold}" / "oof.csv").assign(fold=fold) for fold in range(3)]
    pooled = score(pd.concat(tables)).pooled
    assert pooled.low < 0.5 < pooled.high


@pytest.mark.slow
def test_shuffled_labels_score_one_half(tmp_path: Path) -> None:
    data = Data(tmp_path / "demo")
    make_demo(data)
    labels = pd.read_csv(data.labels)
    labels.assign(label=np.random.default_rng(0).permutation(labels["label"])).to_csv(data.labels, index=False)
    fields = {"width": 16, "max_width": 32, "side": 48, "n_blocks": 3, "n_splits": 3, "epochs": 2, "precision": "fp32"}
    config = replace(experiment(QUICK).config, **fields)
    task = packed(data, tmp_path, config)
    train(task, [0, 1, 2])
    predict(task, [0, 1, 2])
    assert_chance(tmp_path / "run")


def test_chroma_blur_does_not_reach_training(pcam: Callable[..., Outcome], finished_run: Path) -> None:
    """Nets must be trained on sharp colours: the filter helps because they have learnt what it takes away."""
    assert pcam("train", "--set", "chroma_blur=1.5", "--name", "blurred").status == 0
    sharp, blurred = (
        checkpoint.load(finished_run / "runs" / name / "fold_0/last.pt", "net")["net"] for name in ("bottleneck", "blurred")
    )
    assert all(torch.equal(sharp[key], blurred[key]) for key in sharp)
    assert pcam("predict", "--set", "chroma_blur=1.5", "--name", "blurred").status == 0
    tables = [pd.read_csv(finished_run / "runs" / name / "fold_0/test.csv") for name in ("bottleneck", "blurred")]
    assert (tables[0]["probability"] != tables[1]["probability"]).all()
