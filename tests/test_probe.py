"""The probe: features that are computed once, and a logistic regression per fold."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.models.backbone import trained_state
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import import_timm
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training import embed as embedding
from pcam_kaggle.training.budget import Budget
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.embed import embed
from pcam_kaggle.training.learner import load_best
from pcam_kaggle.training.predict import predict_probabilities
from pcam_kaggle.training.probe import PENALTIES, fit, probe
from pcam_kaggle.training.task import Task
from pcam_kaggle.training.train import train_fold

CPU = Backend("cpu", "fp32", "channels_last")


@pytest.fixture
def task(task: Task, tmp_path: Path) -> Task:
    torch.manual_seed(5)
    save_weights(tmp_path / "weights.pth")
    fields = ["precision=fp32", "n_splits=3", "side=64", "freeze=1", "probe=true", "norm=train"]
    config = Config().changed(["model=timm:resnet10t", f"weights={tmp_path / 'weights.pth'}", *fields])
    return replace(task, config=config)


def save_weights(file: Path | str) -> None:
    torch.save(import_timm().create_model("resnet10t").state_dict(), file)


def named(task: Task, name: str, **fields: Any) -> Task:
    return replace(task, run=Run(task.run.folder.with_name(name)), config=replace(task.config, **fields))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the rows of the patches that are embedded from now on, in parts of eight."""
    rows: list[int] = []
    compute = embedding.mean_features

    def watched(*arguments: Any) -> Any:
        rows.extend(arguments[2])
        return compute(*arguments)

    monkeypatch.setattr(embedding, "CHUNK", 8)
    monkeypatch.setattr(embedding, "mean_features", watched)
    return rows


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predictions_are_those_of_the_model_with_the_fitted_classifier(precision: str, task: Task) -> None:
    task = named(task, "run", precision=precision)
    probe(task, [0, 1, 2])
    for fold in task.run.folds():
        assert fold.is_trained
        assert fold.is_predicted(task.store)
        net = load_best(fold, task.config, backend := replace(CPU, precision=precision))
        for split, table in zip(("train", "test"), fold.predictions(), strict=True):
            # In other batches than they were embedded in.
            rows = task.store.rows(split, table["id"].to_numpy())[::-1]
            again = predict_probabilities(net, task.store, rows, task.config, backend, "")
            np.testing.assert_allclose(table["probability"], again[::-1], rtol=0, atol=1e-6)
    assert set(checkpoint.load(fold.best_checkpoint)["net"]) == {"net.fc.weight", "net.fc.bias"}
    # The frozen layers are not in the checkpoint.
    save_weights(task.config.weights)
    with pytest.raises(UserError, match="its folds started from other weights"):
        load_best(fold, task.config, CPU)


@pytest.mark.slow
def test_a_patch_is_embedded_once_per_weights_views_and_precision(task: Task, embedded: list[int]) -> None:
    probe(task, [0])
    assert sorted(embedded) == list(range(36 + 7))
    probe(named(task, "seed", seed=3), [1])
    assert len(embedded) == 36 + 7
    probe(named(task, "views", tta=1), [0])
    assert len(embedded) == 2 * (36 + 7)
    probe(named(task, "precision", precision="bf16"), [0])
    assert len(embedded) == 3 * (36 + 7)
    save_weights(task.config.weights)
    probe(named(task, "weights"), [0])
    assert len(embedded) == 4 * (36 + 7)


def test_an_interrupted_embedding_continues(task: Task, embedded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config, store, write = task.config, task.store, embedding.write

    def fails(*arguments: Any) -> None:
        if len(embedded) > 16:
            raise KeyboardInterrupt
        write(*arguments)

    # In the third part.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding, "write", fails)
        embed(config, store, CPU)
    features, rate = embed(config, store, CPU)
    assert embedded == [*range(24), *range(16, 43)]
    assert rate > 0
    shapes = {split: (array.shape, array.dtype.name) for split, array in features.items()}
    assert shapes == {"train": ((36, 512), "float32"), "test": ((7, 512), "float32")}
    monkeypatch.setattr(embedding, "_key", lambda *_: "fresh")
    fresh, _ = embed(config, store, CPU)
    assert all(np.array_equal(fresh[split], features[split]) for split in shapes)


@pytest.mark.slow
def test_two_gpus_share_the_patches(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = embed(task.config, task.store, CPU)
    monkeypatch.setattr(embedding, "CHUNK", 16)
    monkeypatch.setattr(embedding, "_key", lambda *_: "shared")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shared, _ = embed(task.config, task.store, CPU)
    for split in ("train", "test"):
        np.testing.assert_allclose(shared[split], alone[split], atol=1e-3)


def test_an_embedding_ends_with_the_budget(task: Task, package_log: pytest.LogCaptureFixture) -> None:
    assert embed(task.config, task.store, CPU, Budget(0.0)) is None
    probe(task, [0], Budget(0.0))
    assert "out of time while embedding" in package_log.text
    assert not task.run.fold(0).is_trained


def test_the_fit_is_a_minimum_of_the_penalised_loss() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 6)) * [1, 10, 0.1, 1, 1, 0] + 3).astype(np.float16)
    y = (x[:, 0] + rng.normal(size=400) > 3).astype(np.int64)
    exact = x.astype(np.float64)
    deviation = exact.std(0)
    for penalty, (weight, bias) in zip(PENALTIES, fit(x, y, PENALTIES), strict=True):
        residual = expit(exact @ weight + bias) - y
        gradient = exact.T @ residual / len(y)
        # The penalty is on the coefficients of standardised features.
        np.testing.assert_allclose(gradient[:5] + penalty * weight[:5] * deviation[:5] ** 2, 0, atol=5e-3 * deviation.max())
        assert abs(residual.mean()) < 1e-3
        assert weight[5] == 0


def test_a_feature_that_never_changes_has_no_weight_among_many_patches() -> None:
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=176_000), np.full(176_000, 0.1), np.full(176_000, 431.0)]).astype(np.float16)
    ((weight, _),) = fit(x, (x[:, 0] > 0).astype(np.int64), [0.1])
    assert weight[0] > 0
    np.testing.assert_allclose(weight[1:], 0, atol=1e-9)


def test_labels_of_a_fold_change_nothing_that_predicts_it(task: Task) -> None:
    table = task.folds.table
    turned = table.assign(label=table["label"].where(table["fold"] != 1, 1 - table["label"]))
    other = replace(named(task, "turned"), folds=replace(task.folds, table=turned))
    states = []
    for each in (task, other):
        probe(each, [0, 1])
        states.append([checkpoint.load(each.run.fold(fold).best_checkpoint)["net"]["net.fc.weight"] for fold in (0, 1)])
    assert [torch.equal(*pair) for pair in zip(*states, strict=True)] == [False, True]


def test_a_fold_with_frozen_layers_resumes_exactly(task: Task) -> None:
    fields: dict[str, Any] = {"freeze": 0.5, "probe": False, "epochs": 2, "batch_size": 8, "tta": 1}
    whole, stopped = named(task, "whole", **fields), named(task, "stopped", **fields)
    rows = list(train_fold(whole, 0, CPU))
    next(train_fold(stopped, 0, CPU))
    again = list(train_fold(stopped, 0, CPU))
    assert [row["valid_auc"] for row in again] == [rows[1]["valid_auc"]]
    ours, theirs = (checkpoint.load(each.run.fold(0).last_checkpoint)["net"] for each in (stopped, whole))
    assert ours.keys() == theirs.keys() == trained_state(create(whole.config, weights=False)).keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # The checkpoint lacks the lower layers, which are those of the weights' file.
    net = load_best(stopped.run.fold(0), stopped.config, CPU)
    assert torch.equal(net.net.conv1[0].weight, torch.load(task.config.weights)["conv1.0.weight"])


@pytest.mark.slow
def test_the_command_runs_everything(task: Task, pcam: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--set", f"weights={task.config.weights}", "--set", "model=timm:resnet10t", "--set", "side=64"]
    status, out, err = pcam("probe", "-e", "bottleneck", *options)
    assert status == 0, err
    assert "pooled" in out
    work = tmp_path / "work"
    assert len(pd.read_csv(work / "submissions" / "bottleneck-probe.csv")) == 7
    made = json.loads((work / "runs" / "bottleneck-probe" / "config.json").read_text())["config"]
    assert (made["freeze"], made["probe"]) == (1, True)
    assert "nothing to do" in pcam("probe", "-e", "bottleneck", *options).out
    assert main(["report", "--work", str(work)]) == 0
    # A kernel's output has no checkpoint to resume from.
    elsewhere = Workspace(tmp_path / "elsewhere", tmp_path / "elsewhere" / "store")
    assert import_runs(work, elsewhere) == ["bottleneck-probe"]
    assert len(Run(elsewhere.run("bottleneck-probe")).oof()) == 36
