"""Training: independent of the number of workers, resumed exactly, and its best model reproduces the stored score."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.logs import configure_logging
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import import_timm
from pcam_kaggle.runs import checkpoint, provenance
from pcam_kaggle.runs.records import Environment
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training import augment, budget, cuda_graph, device, engine, gpus
from pcam_kaggle.training import train as training
from pcam_kaggle.training.budget import Budget, Forecast
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.learner import Learner, load_best
from pcam_kaggle.training.loader import TrainBatches, batches
from pcam_kaggle.training.predict import predict, predict_probabilities
from pcam_kaggle.training.schedule import MovingAverage, ema_weight, learning_rate
from pcam_kaggle.training.task import Task, open_session
from pcam_kaggle.training.teacher import load_teacher
from pcam_kaggle.training.train import FoldData, train, train_fold

CPU = Backend("cpu", "fp32", "channels_last")


def changed(task: Task, name: str = "run", **fields: Any) -> Task:
    return replace(task, run=Run(task.run.folder.with_name(name)), config=replace(task.config, **fields))


def assert_equal_nets(*files: Path) -> None:
    one, other = (checkpoint.load(file)["net"] for file in files)
    assert all(torch.equal(one[key], other[key]) for key in one)


def finish(task: Task, fold: int) -> Path:
    list(train_fold(task, fold, CPU))
    return task.run.fold(fold).folder


def test_validation_patches_are_never_trained_on(task: Task) -> None:
    table = task.folds.table
    data = FoldData(task, 1)
    trained, valid = set(task.store.ids("train")[data.train.rows]), set(table["id"][table["fold"] == 1])
    assert set(task.store.ids("train")[data.valid_rows]) == valid
    assert not trained & valid
    assert trained | valid == set(table["id"])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_for_any_number_of_workers(workers: int, task: Task) -> None:
    # A worker would wait forever for the threads of OpenCV that run in this process.
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 5)
    data = FoldData(changed(task, epochs=6), 0).train
    for index, batch in zip(range(2 * (24 // 8), 6 * (24 // 8)), batches(data, 2, workers), strict=True):
        # Time for the workers to write all that they may while this batch is trained on.
        time.sleep(0.02)
        assert all(map(torch.equal, batch, data[index]))


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def not_finite(net: object, store: object, rows: NDArray[np.int64], *_: object) -> torch.Tensor:
    return torch.full((1, len(rows)), torch.nan)


def with_an_infinite_bias(config: Config, weights: bool) -> torch.nn.Module:
    model = create(config)
    torch.nn.init.constant_(model.head[-1].bias, torch.inf)
    return model


WRONG_SHAPE = Mock(side_effect=RuntimeError("a shape\nis wrong"))
OUT_OF_GPU_MEMORY = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
TOO_LARGE = "^batch_size=8: too large for the device's memory; use a smaller one$"


@pytest.mark.parametrize(
    ("owner", "name", "broken", "message"),
    [
        (TrainBatches, "__getitem__", killed, "^a loader process was killed[^\n]*$"),
        (TrainBatches, "__getitem__", WRONG_SHAPE, "a shape\nis wrong"),
        (torch.Tensor, "share_memory_", WRONG_SHAPE, r"^batch_size=8: shared memory has no room for \d+ batches; .*--shm-size"),
        (training, "create", with_an_infinite_bias, "epoch 1, step 1: the loss is .* smaller lr"),
        (training, "train_epoch", OUT_OF_GPU_MEMORY, TOO_LARGE),
        (training, "train_epoch", lambda *_: torch.empty(2**50), TOO_LARGE),
        (training, "predict_logits", not_finite, "^fold 1: a validation logit is not finite"),
    ],
)
def test_a_failure_is_reported_and_the_fold_resumes(
    owner: object, name: str, broken: Callable[..., object], message: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, broken)
        with pytest.raises(RuntimeError if message == "a shape\nis wrong" else UserError, match=message):
            train(task, [1])
    assert not list(task.run.fold(1).folder.glob("*.pt"))
    train(task, [1])
    assert len(task.run.fold(1).log()) == task.config.epochs


def test_each_epoch_takes_every_patch_once_in_a_new_order(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "MAX_SHIFT", 0)
    data = FoldData(changed(task, side=96, stain_jitter=0.0, color_jitter=0.0), 0).train
    sums = [[int(patch.sum()) for index in range(3) for patch in data[epoch * 3 + index][0]] for epoch in range(2)]
    expected = sorted(int(patch.sum()) for patch in task.store.images(data.rows))
    assert sorted(sums[0]) == sorted(sums[1]) == expected
    assert sums[0] != sums[1]


def test_folds_and_seeds_draw_differently(task: Task) -> None:
    rows, labels = np.arange(36), np.zeros(36)
    first = TrainBatches(task.store, rows, labels, task.config, 0)[0][0]
    assert not torch.equal(first, TrainBatches(task.store, rows, labels, task.config, 1)[0][0])
    assert not torch.equal(first, TrainBatches(task.store, rows, labels, replace(task.config, seed=43), 0)[0][0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical(optimizer: str, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = (changed(task, name, epochs=3, optimizer=optimizer, width=16) for name in ("whole", "stopped"))
    finish(whole, 0)

    def stop_in_the_second_epoch(*arguments: Any) -> float:
        if arguments[3] == 1:
            raise KeyboardInterrupt
        return engine.train_epoch(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_epoch", stop_in_the_second_epoch)
        finish(stopped, 0)
    assert len(stopped.run.fold(0).log()) == 1
    finish(stopped, 0)
    for name in ("best.pt", "last.pt"):
        assert_equal_nets(*(each.run.fold(0).folder / name for each in (whole, stopped)))
    logs = [each.run.fold(0).log()[["epoch", "train_loss", "valid_auc", "valid_loss"]] for each in (whole, stopped)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


@pytest.mark.slow
def test_two_devices_equal_one(task: Task, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    # Of three folds with two epochs, the second is split between the devices.
    configure_logging()
    lines, folders = [], []
    for name, devices in (("one", 1), ("two", 2)):
        each = changed(task, name)
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        train(each, [0, 1, 2])
        predict(each, [0, 1, 2])
        lines.append(sorted(line.partition(":")[0] for line in capfd.readouterr().out.splitlines()))
        folders.append(each.run.folder)
    assert lines[0] == lines[1]
    assert "fold 2, epoch  1 of 2" in lines[1]
    names = [f"fold_{fold}/{name}" for fold in range(3) for name in ("oof.csv", "test.csv", "best.pt")]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


def refuse(items: list[int]) -> None:
    raise UserError(f"fold {items[0]}")


@pytest.mark.slow
@pytest.mark.parametrize(("work", "message"), [(refuse, "^fold 0$"), (killed, "^a GPU's process was killed")])
def test_a_gpu_that_fails_in_its_own_process_is_one_error(work: Callable[[list[int]], None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gpus.run_on_gpus(work, [[0], [1]])


def test_a_gpu_that_cannot_compute_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch, "ones", WRONG_SHAPE)
    with pytest.raises(UserError, match=r"^Tesla P100: [^\n]* T4 x2[^\n]*$"):
        device.find_device()


def test_training_ends_with_the_budget_and_resumes(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    def logged_epochs() -> int:
        return sum(len(task.run.fold(fold).log()) for fold in range(3))

    configure_logging()
    train(task, [0, 1, 2], SimpleNamespace(left=lambda: 1e6 if logged_epochs() < 3 else -1.0))
    printed = capsys.readouterr().out
    assert [task.run.fold(fold).is_trained for fold in range(3)] == [True, False, False]
    assert (logged_epochs(), printed.count("folds 0, 1, 2 need"), printed.count("out of time in fold 1")) == (3, 1, 1)
    train(task, [1, 2])
    whole = changed(task, "whole")
    train(whole, [0, 1, 2])
    for fold in range(3):
        assert_equal_nets(*(each.run.fold(fold).best_checkpoint for each in (whole, task)))


def test_the_forecast_counts_the_folds_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.time, "monotonic", lambda: 0.0)
    hour = Budget.of_hours(1)
    # 3,600 s less the 120 s for ending: a fold of 10 epochs of 90 s and 60 s of predictions takes 960 s.
    for left, fit in (([10, 10, 10, 10], "3"), ([9, 10, 10, 10], "3"), ([3, 10, 10, 10], "4"), ([99], "none")):
        assert f", {fit} of them will" in Forecast(dict(enumerate(left)), 2.0, 90, 30).summary(hour.left())


@pytest.mark.parametrize(("before", "seconds"), [([], 50.0), ([device.device_name("cpu")], 50.0), (["Tesla T4"], 0.0)])
def test_the_forecast_is_of_this_sessions_device(
    before: list[str], seconds: float, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "valid_auc": 0.5, "images_per_second": 1.0}
    task.run.fold(0).write_log([{**row, "seconds": 50.0, "valid_seconds": 5.0}])
    for name in before:
        task.run.add_environment(Environment(device=name, backend=CPU.record()))
    seen: list[float] = []
    forecast = Forecast.seconds_to_stop
    monkeypatch.setattr(Forecast, "seconds_to_stop", lambda self, fold: seen.append(self.epoch_seconds) or forecast(self, fold))
    trained = ({**row, "epoch": epoch, "seconds": epoch, "valid_seconds": 0.1} for epoch in (3, 2, 4))
    monkeypatch.setattr(training, "train_fold", lambda *_: trained)
    training._train_segments(task, CPU, 1, budget.ENDLESS, [gpus.Segment(0, 1, 5)])
    assert seen == [seconds, 3, 3, 4]


@pytest.mark.parametrize("broken", ["best.pt", "log.csv"])
def test_an_interruption_between_two_files_is_repaired(broken: str, task: Task) -> None:
    task = changed(task, epochs=1)
    folder = finish(task, 0)
    before = {name: (folder / name).read_bytes() for name in ("log.csv", "metrics.json")}
    for name in (broken, "metrics.json"):
        (folder / name).unlink()
    finish(task, 0)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert checkpoint.load(folder / "best.pt")["epoch"] == 1


def test_best_reloaded_gives_the_stored_auc(task: Task) -> None:
    finish(task, 2)
    fold, data = task.run.fold(2), FoldData(task, 2)
    net = load_best(fold, task.config, CPU)
    logits = engine.predict_logits(net, task.store, data.valid_rows, task.config, CPU, 1, "test")[0].double().numpy()
    assert auc(data.valid_labels, logits) == fold.metrics().valid_auc == fold.log()["valid_auc"].max()
    losses = fold.log().set_index("epoch")["valid_loss"]
    assert losses[fold.metrics().epoch] == pytest.approx(log_loss(data.valid_labels, 1 / (1 + np.exp(-logits))), rel=1e-6)


@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_the_learning_rate_rises_once_and_falls_once(epochs: int) -> None:
    config = replace(Config(), epochs=epochs, lr=1.0)
    rates = np.array([learning_rate(config, progress) for progress in np.linspace(0, epochs, 501)])
    top = int(rates.argmax())
    assert (np.diff(rates[: top + 1]) >= 0).all()
    assert (np.diff(rates[top:]) <= 0).all()
    np.testing.assert_allclose(rates[[top, -1]], [1, 0.01], rtol=1e-3)


def test_the_ema_forgets_its_start_keeps_a_horizon_and_includes_the_norms_statistics() -> None:
    config = replace(Config(), average_epochs=2.0)
    weights = [ema_weight(config, 10, 0), ema_weight(config, 10, 10_000), ema_weight(replace(config, average_epochs=0), 10, 99)]
    assert weights == pytest.approx([1, 1 / 20, 1])
    net, ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    net(torch.randn(8, 2) + 5)
    MovingAverage(ema, net).update(torch.tensor(0.5))
    torch.testing.assert_close(ema.running_mean, net.running_mean / 2)
    assert ema.num_batches_tracked == net.num_batches_tracked == 1
    MovingAverage(ema, net).update(torch.tensor(1.0))
    assert torch.equal(ema.running_mean, net.running_mean)


def test_a_step_has_the_learning_rate_of_its_end(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    load = Learner.load
    monkeypatch.setattr(Learner, "load", lambda *values: given.append(values[3]) or load(*values))
    finish(task, 0)
    assert given == pytest.approx([learning_rate(task.config, (step + 1) / 3) for step in range(6)])


def taught(task: Task, folds: list[int]) -> Task:
    """Train `folds` of the run `old`; return the task of a run of one epoch that it teaches."""
    train(changed(task, "old"), folds)
    return changed(task, teacher="old", epochs=1)


def test_a_student_learns_what_its_teacher_says_of_the_same_augmented_patches(task: Task) -> None:
    student = taught(task, [1])
    with pytest.raises(UserError, match=r"old/fold_0: the teacher's training is not finished"):
        finish(student, 0)
    data = FoldData(student, 1)
    assert set(data.train.rows) == set(FoldData(task, 1).train.rows) | set(task.store.rows("test", task.store.ids("test")))
    learner = Learner(create(student.config), student.config, CPU, 8, load_teacher(student, 1, CPU))
    learner.model.eval()
    patches, no_targets = data.train[0]
    learner.load(patches, no_targets, 1e-3, 1.0)
    logits = learner.model(CPU.images(patches)).detach()
    learner.compute()
    teacher = load_best(student.run.fold(1).teacher("old"), task.config, CPU)
    rows = task.store.rows("test", task.store.ids("test"))
    engine.adapt_norms(teacher, task.store, rows, task.config, CPU)
    targets = teacher(CPU.images(patches)).detach().sigmoid()
    assert learner.loss.item() == pytest.approx(log_loss_of(targets, logits), rel=1e-5)


def log_loss_of(targets: torch.Tensor, logits: torch.Tensor) -> float:
    return float(-(targets * logits.sigmoid().log() + (1 - targets) * (-logits).sigmoid().log()).mean())


def test_a_student_does_not_resume_with_another_teacher(task: Task) -> None:
    student = changed(taught(task, [0, 1, 2]), epochs=2)
    teacher = student.run.fold(0).teacher("old").best_checkpoint
    train(student, [1])
    next(train_fold(student, 0, CPU))
    own = teacher.read_bytes()
    shutil.copy(student.run.fold(2).teacher("old").best_checkpoint, teacher)
    with pytest.raises(UserError, match="other models of its teacher old"):
        train(student, [0])
    teacher.write_bytes(own)
    train(student, [0])
    shutil.rmtree(task.run.folder.with_name("old"))
    student.run.check(student.config, student.store, student.folds)


def test_a_teacher_with_other_folds_is_refused(task: Task, tmp_path: Path) -> None:
    other = Folds(task.folds.table, task.folds.manifest.model_copy(update={"csv_sha256": "0" * 64}))
    Run(tmp_path / "old").open("tiny", task.config, task.store, other)
    with pytest.raises(UserError, match="the teacher has other folds"):
        train(changed(task, teacher="old"), [0])
    assert not task.run.folder.exists()


def test_folds_of_a_run_start_from_the_same_weights(task: Task, tmp_path: Path) -> None:
    timm, file = import_timm(), tmp_path / "weights.pth"
    task = changed(task, model="timm:mobilenetv3_small_050", weights=str(file), epochs=1)
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), file)
    train(task, [0])
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), file)
    with pytest.raises(UserError, match="its folds started from other weights"):
        train(task, [1])
    file.unlink()
    train(task, [0])


def test_a_fold_records_how_long_it_waited_and_what_its_steps_were(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    read = training.batches
    monkeypatch.setattr(training, "batches", lambda *given: (time.sleep(0.3) or batch for batch in read(*given)))
    train(task, [0])
    made = task.run.fold(0).metrics()
    assert 0.5 < made.loader_wait <= 1
    assert made.steps.startswith("eager, because the device is cpu")


@pytest.mark.parametrize(("replay", "steps"), [(print, "as a CUDA graph, because why"), (None, "eager, because why")])
def test_the_kind_of_steps_is_recorded_with_its_reason(replay: Any, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "compared", lambda *_: (replay, "why"))
    learner = SimpleNamespace(backend=Backend("cuda", "fp16", "channels_last"))
    assert cuda_graph.fastest_step(learner) is replay
    assert learner.steps == steps


def test_every_session_is_recorded_and_the_last_backend_is_reused(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name, value in (("find_device", "cuda"), ("configure_torch", None), ("native_precision", "fp16")):
            patch.setattr(device, name, lambda *_, value=value: value)
        patch.setattr("pcam_kaggle.training.task.device_name", lambda kind: f"a {kind}")
        assert open_session(changed(task, precision="auto")).precision == "fp16"
    for fold in (0, 1):
        train(task, [fold])
    first, second = task.run.environments()
    assert (first.device, first.backend.precision) == ("a cuda", "fp16")
    assert second.backend.kind == "cpu"
    monkeypatch.setattr(provenance, "session_start", lambda: "another day")
    train(task, [2])
    assert [entry.started for entry in task.run.environments()][-1] == "another day"
    assert len(task.run.environments()) == 3
    used = Backend("cpu", "bf16", "contiguous")
    task.run.add_environment(Environment(backend=used.record()))
    assert open_session(task) == used


@pytest.mark.parametrize("symmetry", ["none", "d4"])
def test_norms_take_the_statistics_of_what_is_predicted(store: PatchStore, tiny: Config, symmetry: str) -> None:
    config = replace(tiny, symmetry=symmetry, width=16, max_width=32)
    net = create(config)
    rows = store.rows("train", store.ids("train"))
    images = CPU.images(torch.from_numpy(engine.center_crop(store.images(rows), config.side)))
    before = {name: value.clone() for name, value in net.named_parameters()}
    engine.adapt_norms(net, store, rows, config, CPU)
    stem = net.eval().stem
    with torch.no_grad():
        normed = stem[2](stem[1](stem[0](net.normalize(images))))
    groups = normed if symmetry == "none" else normed.unflatten(1, (8, -1)).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(groups.mean((0, 2, 3)), torch.zeros(groups.shape[1]), atol=2e-3, rtol=0)
    torch.testing.assert_close(groups.std((0, 2, 3)), torch.ones(groups.shape[1]), atol=2e-2, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


@pytest.mark.parametrize("norm", ["train", "test"])
def test_predictions_depend_on_the_patches_alone_and_not_on_their_order(store: PatchStore, tiny: Config, norm: str) -> None:
    config, rows = replace(tiny, norm=norm), store.rows("train", store.ids("train"))
    net = create(config).eval()
    orders = (rows, rows[::-1], rows[12:], rows)
    forward, backward, part, again = (predict_probabilities(net, store, order, config, CPU, "") for order in orders)
    np.testing.assert_allclose(forward, backward[::-1], rtol=1e-5)
    assert forward.std() > 0
    assert np.array_equal(again, forward)
    assert np.allclose(part, forward[12:], rtol=1e-5) == (norm == "train")


def test_statistics_are_those_of_a_sample(store: PatchStore, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    images = PatchStore.images
    monkeypatch.setattr(PatchStore, "images", lambda self, rows: read.extend(rows) or images(self, rows))
    rows = store.rows("train", store.ids("train"))
    monkeypatch.setattr(engine, "NORM_PATCHES", 10)
    engine.adapt_norms(create(tiny), store, rows, tiny, CPU)
    assert len(set(read)) == len(read) == 10
    assert set(read) <= set(rows)
    engine.adapt_norms(torch.nn.Conv2d(3, 1, 1), store, rows, tiny, CPU)
    assert len(read) == 10, "a model without batch norms reads patches for nothing"
