"""Training: independent of the number of workers, resumed exactly, and its best net reproduces the stored score."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import read_json, write_csv
from pcam_kaggle.core.logs import configure_logging
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.weights import import_timm
from pcam_kaggle.runs import checkpoint, provenance
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training import augment, budget, device, engine, gpus, loader, session
from pcam_kaggle.training import train as training
from pcam_kaggle.training.budget import Budget, Forecast
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import predict_logits
from pcam_kaggle.training.fold_state import load_best
from pcam_kaggle.training.loader import TrainBatches, batches
from pcam_kaggle.training.optim import parameter_groups
from pcam_kaggle.training.predict import predict, predict_probabilities
from pcam_kaggle.training.schedule import MovingAverage, average_weight, learning_rate
from pcam_kaggle.training.train import fold_epochs

CPU = Backend("cpu", "fp32", "channels_last")


def train_batches(store: PatchStore, folds: Folds, config: Config, fold: int = 0) -> TrainBatches:
    """Return the batches of one fold."""
    table = folds.table[folds.table["fold"] != fold]
    return TrainBatches(store, store.rows("train", table["id"].to_numpy()), table["label"].to_numpy(), config, fold)


def train_fold(fold: Fold, config: Config, store: PatchStore, folds: Folds) -> None:
    """Train `fold` to its end on the CPU."""
    list(fold_epochs(fold, config, store, folds.table, CPU))


def test_validation_patches_are_never_trained_on(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(training, "batches", lambda data, *rest: seen.append(data) or batches(data, *rest))
    train_fold(Fold(tmp_path, 1), tiny, store, folds)
    trained = set(store.ids("train")[seen[0].rows])
    valid = set(folds.table["id"][folds.table["fold"] == 1])
    assert not trained & valid
    assert trained | valid == set(folds.table["id"])


@pytest.mark.parametrize("cpus", [1, 3])
def test_batches_are_the_same_for_any_number_of_workers(
    cpus: int, store: PatchStore, folds: Folds, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader.os, "cpu_count", lambda: cpus)
    data = train_batches(store, folds, replace(tiny, epochs=6))
    count = 0
    for index, (patches, targets) in enumerate(batches(data, 2, 2), 2 * data.steps):
        # Time for the workers to write all that they may while this batch is with the net.
        time.sleep(0.02)
        expected, same = data[index]
        assert torch.equal(patches, expected)
        assert torch.equal(targets, same)
        count += 1
    assert count == 4 * (24 // 8)


def test_a_killed_worker_is_one_error_and_the_fold_resumes(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(TrainBatches, "__getitem__", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=r"^fold 1: a loader process was killed") as caught:
            training.train(Run(tmp_path / "run"), "tiny", tiny, store, folds, [1])
    assert "\n" not in str(caught.value)
    training.train(Run(tmp_path / "run"), "tiny", tiny, store, folds, [1])
    assert len(pd.read_csv(tmp_path / "run" / "fold_1" / "log.csv")) == tiny.epochs


def test_a_bug_in_a_worker_is_not_reported_as_a_killed_process(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(self: TrainBatches, index: int) -> None:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(TrainBatches, "__getitem__", mistaken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        training.train(Run(tmp_path / "run"), "tiny", tiny, store, folds, [1])


def out_of_a_gpus_memory(*_: object) -> float:
    """Raise what torch raises where a GPU's memory is full."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_memory(*_: object) -> float:
    """Ask torch for more memory than there is."""
    return float(torch.empty(2**50)[0])


@pytest.mark.parametrize("epoch", [out_of_a_gpus_memory, out_of_memory])
def test_a_batch_too_large_for_memory_is_one_error(
    epoch: Callable[..., float],
    store: PatchStore,
    folds: Folds,
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "train_epoch", epoch)
    with pytest.raises(UserError, match=r"^batch_size=8: too large for the device's memory; use a smaller one$"):
        training.train(Run(tmp_path / "run"), "tiny", tiny, store, folds, [1])


def test_shared_memory_that_is_too_small_is_one_error(
    store: PatchStore, folds: Folds, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_1_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"^batch_size=8: shared memory has no room for \d+ batches; .*--shm-size"):
        next(batches(train_batches(store, folds, tiny), 0, 2))


def test_workers_start_after_opencv_has_used_its_threads(store: PatchStore, folds: Folds, tiny: Config) -> None:
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 5)
    assert len(list(batches(train_batches(store, folds, tiny), 0, 2))) == 6


def test_each_epoch_takes_every_patch_once_in_a_new_order(
    store: PatchStore, folds: Folds, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "MAX_SHIFT", 0)
    config = replace(tiny, side=96, stain_jitter=0.0, color_jitter=0.0)
    data = train_batches(store, folds, config)
    sums = [[int(patch.sum()) for index in range(3) for patch in data[epoch * 3 + index][0]] for epoch in range(2)]
    expected = sorted(int(patch.sum()) for patch in store.images(data.rows))
    assert sorted(sums[0]) == sorted(sums[1]) == expected
    assert sums[0] != sums[1]


def test_folds_and_seeds_draw_differently(store: PatchStore, folds: Folds, tiny: Config) -> None:
    table = folds.table
    rows, labels = store.rows("train", table["id"].to_numpy()), table["label"].to_numpy()
    first = TrainBatches(store, rows, labels, tiny, 0)[0][0]
    assert not torch.equal(first, TrainBatches(store, rows, labels, tiny, 1)[0][0])
    assert not torch.equal(first, TrainBatches(store, rows, labels, replace(tiny, seed=43), 0)[0][0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    optimizer: str, store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, epochs=3, optimizer=optimizer, width=16)
    train_fold(Fold(tmp_path / "whole", 0), config, store, folds)

    class Stop(Exception):
        pass

    def stop_in_the_second_epoch(step, source, steps, epoch, config):  # noqa: ANN001, ANN202
        if epoch == 1:
            raise Stop
        return engine.train_epoch(step, source, steps, epoch, config)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(training, "train_epoch", stop_in_the_second_epoch)
        train_fold(Fold(tmp_path / "stopped", 0), config, store, folds)
    assert len(pd.read_csv(tmp_path / "stopped" / "fold_0" / "log.csv")) == 1
    train_fold(Fold(tmp_path / "stopped", 0), config, store, folds)
    for name in ("best.pt", "last.pt"):
        whole, stopped = (checkpoint.load(tmp_path / run / "fold_0" / name)["net"] for run in ("whole", "stopped"))
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    logs = [Fold(tmp_path / run, 0).log()[["epoch", "train_loss", "valid_auc"]] for run in ("whole", "stopped")]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


@pytest.mark.slow
def test_folds_on_two_devices_equal_those_on_one(
    store: PatchStore,
    folds: Folds,
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Of three folds with two epochs, the second is split between the devices.
    config = replace(tiny, epochs=2)
    configure_logging()
    lines = []
    for run, devices in (("one", 1), ("two", 2)):
        monkeypatch.setattr(gpus, "gpu_count", lambda devices=devices: devices)
        monkeypatch.setattr(training, "gpu_count", lambda devices=devices: devices)
        training.train(Run(tmp_path / run), "tiny", config, store, folds, [0, 1, 2])
        predict(Run(tmp_path / run), config, store, folds, [0, 1, 2])
        lines.append(sorted(line.partition(":")[0] for line in capfd.readouterr().out.splitlines()))
    assert lines[0] == lines[1]
    assert "fold 2, epoch  1 of 2" in lines[1]
    for name in ("oof.csv", "test.csv", "best.pt"):
        for fold in range(3):
            assert (tmp_path / "one" / f"fold_{fold}" / name).read_bytes() == (
                tmp_path / "two" / f"fold_{fold}" / name
            ).read_bytes()


def test_a_device_that_fails_in_its_own_process_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpu_count", lambda: 2)
    with pytest.raises(UserError, match=r"^fold 1$"):
        gpus.spread_over_gpus(_refuse, [[0], [1]])


def test_child_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "orphans.py").write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    with subprocess.Popen([sys.executable, "orphans.py"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as parent:
        while len(started := list(tmp_path.glob("[0-9]*"))) < 2:
            assert parent.poll() is None
            time.sleep(0.1)
        parent.kill()
    pids = [int(file.name) for file in started]
    for _ in range(50):
        pids = [pid for pid in pids if Path(f"/proc/{pid}/fd/0").exists()]
        time.sleep(0.1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert not pids


ORPHANS = """
import os, time
from pathlib import Path
from pcam_kaggle.training import gpus

def work(share):
    Path(str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    gpus.gpu_count = lambda: 2
    gpus.spread_over_gpus(work, [[0], [1]])
"""


def test_a_gpus_process_that_is_killed_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpu_count", lambda: 2)
    with pytest.raises(UserError, match=r"^a GPU's process was killed"):
        gpus.spread_over_gpus(_die, [[0], [1]])


def _die(share: list[int]) -> None:
    if share == [1]:
        os.kill(os.getpid(), signal.SIGKILL)


def _refuse(share: list[int]) -> None:
    if share == [1]:
        raise UserError("fold 1")


def test_a_gpu_that_cannot_compute_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")

    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be")

    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(UserError, match=r"^Tesla P100: .* T4 x2") as caught:
        device.find_device()
    assert "\n" not in str(caught.value)


def test_training_ends_with_the_budget_and_resumes(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Clock:
        """A budget that ends after `epochs` epochs."""

        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def left(self) -> float:
            return 1e6 if logged_epochs(tmp_path / "run") < self.epochs else -1.0

    def logged_epochs(run: Path) -> int:
        return sum(len(Run(run).fold(fold).log()) for fold in range(3))

    config = replace(tiny, epochs=2)
    configure_logging()
    training.train(Run(tmp_path / "run"), "tiny", config, store, folds, [0, 1, 2], Clock(3))
    printed = capsys.readouterr().out
    assert [Run(tmp_path / "run").fold(fold).is_trained for fold in range(3)] == [True, False, False]
    assert logged_epochs(tmp_path / "run") == 3
    assert "out of time in fold 1" in printed
    assert "folds 0, 1, 2 need" in printed
    training.train(Run(tmp_path / "run"), "tiny", config, store, folds, [1, 2])
    training.train(Run(tmp_path / "whole"), "tiny", config, store, folds, [0, 1, 2])
    for fold in range(3):
        whole, stopped = (checkpoint.load(tmp_path / run / f"fold_{fold}" / "best.pt")["net"] for run in ("whole", "run"))
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_the_forecast_counts_the_folds_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.time, "monotonic", lambda: 0.0)
    hour = Budget.of_hours(1)
    # 3,600 s less the 120 s for ending: a fold of 10 epochs of 90 s and 60 s of predictions takes 960 s.
    for left, fit in (
        ([10, 10, 10, 10], "3 of them will"),
        ([9, 10, 10, 10], "3 of them will"),
        ([3, 10, 10, 10], "4 of them will"),
        ([99], "none of them will"),
    ):
        assert fit in Forecast(list(range(len(left))), left, 2.0, 90, 30).summary(hour.left())


@pytest.mark.parametrize("broken", ["best.pt", "log.csv"])
def test_an_interruption_between_two_files_is_repaired(
    broken: str, store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path
) -> None:
    config = replace(tiny, epochs=1)
    train_fold(Fold(tmp_path, 0), config, store, folds)
    before = {name: (tmp_path / "fold_0" / name).read_bytes() for name in ("log.csv", "metrics.json")}
    for name in (broken, "metrics.json"):
        (tmp_path / "fold_0" / name).unlink()
    train_fold(Fold(tmp_path, 0), config, store, folds)
    assert {name: (tmp_path / "fold_0" / name).read_bytes() for name in before} == before
    assert checkpoint.load(tmp_path / "fold_0" / "best.pt")["epoch"] == 1


def test_best_reloaded_gives_the_stored_auc(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    train_fold(Fold(tmp_path, 2), tiny, store, folds)
    valid = folds.table[folds.table["fold"] == 2]
    net = load_best(Fold(tmp_path, 2), tiny, CPU)
    rows = store.rows("train", valid["id"].to_numpy())
    logits = predict_logits(net, store, rows, tiny, CPU, 1, "test")[0].double().numpy()
    stored = read_json(tmp_path / "fold_2" / "metrics.json")["valid_auc"]
    assert auc(valid["label"].to_numpy(), logits) == stored
    assert stored == pd.read_csv(tmp_path / "fold_2" / "log.csv")["valid_auc"].max()


def test_tensorboard_sees_the_log(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_fold(Fold(tmp_path, 0), tiny, store, folds)
    seen = events.EventAccumulator(str(tmp_path / "fold_0" / "events")).Reload()
    log = pd.read_csv(tmp_path / "fold_0" / "log.csv")
    for name in ("valid_auc", "train_loss", "lr"):
        points = seen.Scalars(name)
        assert [point.step for point in points] == log["epoch"].tolist()
        np.testing.assert_allclose([point.value for point in points], log[name], rtol=1e-6)


def test_another_config_does_not_resume_in_the_same_folder(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path
) -> None:
    Run(tmp_path / "run").open("tiny", tiny, store, folds)
    with pytest.raises(UserError, match=r"lr \(0.002 → 0.1\)"):
        Run(tmp_path / "run").check(replace(tiny, lr=0.1), store, folds)


def test_a_loss_that_is_not_finite_stops_with_the_losses_before(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Config, weights: bool) -> torch.nn.Module:
        net = create(config)
        torch.nn.init.constant_(net.head[-1].bias, torch.inf)
        return net

    monkeypatch.setattr(training, "create", broken)
    with pytest.raises(UserError, match=r"epoch 1, step 1: the loss is .* smaller lr"):
        train_fold(Fold(tmp_path, 0), tiny, store, folds)
    assert not list((tmp_path / "fold_0").glob("*.pt"))


def test_validation_logits_that_are_not_finite_are_one_line(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "predict_logits", lambda net, store, rows, *_: torch.full((1, len(rows)), torch.nan))
    with pytest.raises(UserError, match="fold 1: a validation logit is not finite"):
        next(fold_epochs(Fold(tmp_path, 1), tiny, store, folds.table, CPU))


def test_the_learning_rate_rises_once_and_falls_once() -> None:
    config = replace(Config(), epochs=10, lr=1.0)
    rates = np.array([learning_rate(config, progress) for progress in np.linspace(0, 10, 501)])
    top = int(rates.argmax())
    assert rates.max() == pytest.approx(1.0, abs=1e-3)
    assert (np.diff(rates[: top + 1]) >= 0).all()
    assert (np.diff(rates[top:]) <= 0).all()
    assert rates[-1] == pytest.approx(0.01)


def test_the_average_forgets_its_start_and_keeps_a_horizon() -> None:
    config = replace(Config(), average_epochs=2.0)
    net, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(net.weight, 3.0)
    MovingAverage(average, net).update(torch.tensor(average_weight(config, 10, 0)))
    assert torch.equal(average.weight, net.weight)
    assert average_weight(config, 10, 10_000) == pytest.approx(1 / 20)
    assert average_weight(replace(config, average_epochs=0.0), 10, 10_000) == 1


def test_averaging_includes_the_norms_statistics() -> None:
    net, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    net(torch.randn(8, 2) + 5)
    MovingAverage(average, net).update(torch.tensor(0.5))
    torch.testing.assert_close(average.running_mean, net.running_mean / 2)
    assert average.num_batches_tracked == net.num_batches_tracked == 1


def test_a_net_without_norms_is_averaged_too() -> None:
    net, average = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    MovingAverage(average, net).update(torch.tensor(1.0))
    assert torch.equal(average.weight, net.weight)


def test_a_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.pt", {"net": {"weight": torch.zeros(100)}})
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_layers_learn_at_rates_that_fall_towards_the_input(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, *arguments):  # noqa: ANN002, ANN202
            rates.append([group["lr"] / group["lr_scale"] for group in self.param_groups])
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    config = replace(tiny, model="timm:resnet10t", layer_decay=0.8, epochs=1)
    train_fold(Fold(tmp_path, 0), config, store, folds)
    assert len(rates[0]) > 4
    expected = [learning_rate(config, (step + 1) / len(rates)) for step in range(len(rates))]
    np.testing.assert_allclose(np.array(rates), np.array(expected)[:, None].repeat(len(rates[0]), 1))


def test_vectors_get_no_weight_decay() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 1))
    decayed, free = parameter_groups(net)
    assert decayed["weight_decay"] > 0 == free["weight_decay"]
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 3, 3), (1, 4)]
    assert [tuple(p.shape) for p in free["params"]] == [(4,), (4,), (4,), (1,)]


def test_a_teachers_answers_are_learnt_for_its_own_fold(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, teacher="old", epochs=1)
    with pytest.raises(UserError, match=r"old/fold_1/test.csv: no predictions of the teacher"):
        train_fold(Fold(tmp_path / "new", 1), config, store, folds)
    (tmp_path / "old" / "fold_1").mkdir(parents=True)
    answers = pd.DataFrame({"id": store.ids("test")[::-1], "probability": np.linspace(0.1, 0.7, 7)})
    answers.to_csv(tmp_path / "old" / "fold_1" / "test.csv", index=False)
    seen = []
    monkeypatch.setattr(training, "batches", lambda data, *rest: seen.append(data) or batches(data, *rest))
    train_fold(Fold(tmp_path / "new", 1), config, store, folds)
    learnt = dict(zip(seen[0].rows, seen[0].targets, strict=True))
    for name, probability in answers.itertuples(index=False):
        assert learnt[store.rows("test", np.array([name], object))[0]] == pytest.approx(probability)
    valid = store.rows("train", folds.table["id"][folds.table["fold"] == 1].to_numpy())
    assert not set(valid) & set(learnt)


def test_a_student_does_not_resume_with_another_teacher(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    teacher, student = tmp_path / "old", tmp_path / "new"
    config = replace(tiny, teacher="old")
    Run(teacher).open("tiny", tiny, store, folds)
    answers = pd.DataFrame({"id": store.ids("test"), "probability": np.linspace(0.1, 0.7, 7)})
    for fold in range(3):
        write_csv(teacher / f"fold_{fold}" / "test.csv", answers)
    training.train(Run(student), "tiny", config, store, folds, [1])
    next(fold_epochs(Fold(student, 0), config, store, folds.table, CPU))
    write_csv(teacher / "fold_2" / "test.csv", answers.assign(probability=0.5))
    training.train(Run(student), "tiny", config, store, folds, [2])
    write_csv(teacher / "fold_0" / "test.csv", answers.assign(probability=0.5))
    with pytest.raises(UserError, match="other predictions of its teacher old"):
        training.train(Run(student), "tiny", config, store, folds, [0])
    write_csv(teacher / "fold_0" / "test.csv", answers)
    training.train(Run(student), "tiny", config, store, folds, [0])
    shutil.rmtree(teacher)
    Run(student).check(config, store, folds)


def test_a_student_whose_teacher_was_not_recorded_does_not_resume(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path
) -> None:
    answers = pd.DataFrame({"id": store.ids("test"), "probability": np.linspace(0.1, 0.7, 7)})
    write_csv(tmp_path / "old" / "fold_1" / "test.csv", answers)
    fold = Fold(tmp_path / "new", 1)
    next(fold_epochs(fold, replace(tiny, teacher="old"), store, folds.table, CPU))
    (fold.folder / "teacher.json").unlink()
    with pytest.raises(UserError, match=r"teacher.json: missing, so the teacher may have changed"):
        next(fold_epochs(fold, replace(tiny, teacher="old"), store, folds.table, CPU))


def test_folds_of_a_run_start_from_the_same_weights(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    timm, file, run = import_timm(), tmp_path / "weights.pth", tmp_path / "run"
    config = replace(tiny, model="timm:mobilenetv3_small_050", weights=str(file), epochs=1)
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), file)
    training.train(Run(run), "tiny", config, store, folds, [0])
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), file)
    with pytest.raises(UserError, match="its folds started from other weights"):
        training.train(Run(run), "tiny", config, store, folds, [1])
    file.unlink()
    training.train(Run(run), "tiny", config, store, folds, [0])


def test_every_session_that_works_on_a_run_is_recorded(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(session, "find_device", lambda: "cuda")
    monkeypatch.setattr(session, "configure_torch", lambda: None)
    monkeypatch.setattr(session, "choose_backend", lambda *_: Backend("cuda", "fp16", "channels_last"))
    monkeypatch.setattr(session, "device_name", lambda kind: f"a {kind}")
    on_gpu = session.open_session(Run(run), tiny, store)
    monkeypatch.undo()
    training.train(Run(run), "tiny", tiny, store, folds, [0])
    training.train(Run(run), "tiny", tiny, store, folds, [1])
    first, second = Run(run).environments()
    assert (first["device"], first["backend"]["precision"]) == ("a cuda", on_gpu.precision)
    assert second["backend"]["kind"] == "cpu"
    monkeypatch.setattr(provenance, "session_start", lambda: "another day")
    training.train(Run(run), "tiny", tiny, store, folds, [2])
    assert [entry["started"] for entry in Run(run).environments()][-1] == "another day"
    assert len(Run(run).environments()) == 3


def test_an_environment_of_one_session_is_read_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"backend": {"kind": "cpu"}}')
    assert Run(tmp_path).environments() == [{"backend": {"kind": "cpu"}}]
    (tmp_path / "environment.json").write_text('[{"device": 3}]')
    with pytest.raises(UserError, match=r"environment.json: not in the format of this version"):
        Run(tmp_path).environments()


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
def test_the_order_of_the_patches_changes_no_prediction(store: PatchStore, tiny: Config, norm: str) -> None:
    config, rows = replace(tiny, norm=norm), store.rows("train", store.ids("train"))
    net = create(config).eval()
    forward, backward = (predict_probabilities(net, store, given, config, CPU, "") for given in (rows, rows[::-1]))
    np.testing.assert_allclose(forward, backward[::-1], rtol=1e-5)
    assert forward.std() > 0


def test_statistics_are_taken_from_a_sample_of_many_patches(
    store: PatchStore, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Watched:
        def images(self, rows: NDArray[np.int64]) -> NDArray[Any]:
            read.extend(rows)
            return store.images(rows)

    rows = store.rows("train", store.ids("train"))
    monkeypatch.setattr(engine, "NORM_PATCHES", 10)
    engine.adapt_norms(create(tiny), Watched(), rows, tiny, CPU)
    assert len(set(read)) == len(read) == 10
    assert set(read) <= set(rows)
    engine.adapt_norms(torch.nn.Conv2d(3, 1, 1), Watched(), rows, tiny, CPU)
    assert len(read) == 10, "a net without batch norms reads patches for nothing"


def test_statistics_come_from_the_predicted_patches_alone(store: PatchStore, tiny: Config) -> None:
    net, rows = create(tiny), store.rows("train", store.ids("train"))
    first = predict_probabilities(net, store, rows[:12], tiny, CPU, "")
    other = predict_probabilities(net, store, rows[12:], tiny, CPU, "")
    assert np.array_equal(predict_probabilities(net, store, rows[:12], tiny, CPU, ""), first)
    assert not np.array_equal(predict_probabilities(net, store, rows, tiny, CPU, "")[12:], other)


def test_a_teacher_with_other_folds_is_refused(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    other = Folds(folds.table, folds.manifest.model_copy(update={"csv_sha256": "0" * 64}))
    Run(tmp_path / "old").open("tiny", tiny, store, other)
    with pytest.raises(UserError, match="the teacher has other folds"):
        training.train(Run(tmp_path / "new"), "tiny", replace(tiny, teacher="old"), store, folds, [0])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="not a path"):
        replace(tiny, teacher="../old")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these options")
def test_freed_memory_is_held_for_the_next_step() -> None:
    code = """
import resource, torch
from pcam_kaggle.core.process import tune_malloc
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = [faults() for _ in range(5)][-1]
tune_malloc()
held = [faults() for _ in range(12)][-1]
print(given_back > 1000, held < 100)
"""
    # Huge pages are faulted in by the hundred, and would hide what is given back.
    small_pages = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=small_pages).stdout
    assert printed == "True True\n"


def test_an_unknown_backend_names_the_file_that_has_it(store: PatchStore, tiny: Config, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.add_environment({"backend": {"kind": "cpu", "precision": "fp8", "memory_format": "contiguous"}})
    with pytest.raises(UserError, match=r"environment\.json"):
        session.open_session(run, tiny, store)
