"""Training: the same whatever the workers, whole after an interruption, and its best net gives the score it stored."""

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

from pcam_kaggle import UserError
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import read_json, write_csv
from pcam_kaggle.data.csv_io import read_labels
from pcam_kaggle.data.folds import Folds, Scheme, make
from pcam_kaggle.data.layout import Data
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models import checkpoint
from pcam_kaggle.models.factory import create, import_timm
from pcam_kaggle.runs.run import check_run, open_run, read_environments, read_log, trained
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training import budget, device, engine
from pcam_kaggle.training import train as room
from pcam_kaggle.training.budget import Budget
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import TrainBatches, average_weight, batches, follow, learning_rate, predict_logits
from pcam_kaggle.training.predict import predict
from pcam_kaggle.training.train import _forecast, fold_epochs, load_best

CPU = Backend("cpu", "fp32", "channels_last")


@pytest.fixture
def store(data: Data, tmp_path: Path) -> PatchStore:
    """Return the packed patches of `data`."""
    prepare(data, tmp_path / "store")
    return PatchStore(tmp_path / "store")


@pytest.fixture
def folds(data: Data, tmp_path: Path) -> Folds:
    """Return three folds of `data`."""
    return make(read_labels(data.labels), Scheme(3, 42, "stratified"), None, tmp_path / "folds")[0]


def train_batches(store: PatchStore, folds: Folds, config: Config, fold: int = 0) -> TrainBatches:
    """Return the batches of one fold."""
    table = folds.table[folds.table["fold"] != fold]
    return TrainBatches(store, store.rows("train", table["id"].to_numpy()), table["label"].to_numpy(), config, fold)


def train_fold(*arguments: Any) -> list[dict[str, float]]:
    """Train a fold to its end."""
    return list(fold_epochs(*arguments))


def test_validation_patches_are_never_trained_on(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(room, "batches", lambda data, *rest: seen.append(data) or batches(data, *rest))
    train_fold(tmp_path / "fold_1", tiny, store, folds.table, 1, CPU)
    trained = set(store.ids("train")[seen[0].rows])
    valid = set(folds.table["id"][folds.table["fold"] == 1])
    assert not trained & valid
    assert trained | valid == set(folds.table["id"])


@pytest.mark.parametrize("cpus", [1, 3])
def test_batches_are_the_datas_own_for_any_number_of_workers(
    cpus: int, store: PatchStore, folds: Folds, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.os, "cpu_count", lambda: cpus)
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


def test_a_killed_worker_is_one_error_and_the_fold_goes_on(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(TrainBatches, "__getitem__", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=r"^fold 1: a process that augments was killed") as caught:
            room.train(tmp_path / "run", "tiny", tiny, store, folds, [1])
    assert "\n" not in str(caught.value)
    room.train(tmp_path / "run", "tiny", tiny, store, folds, [1])
    assert len(pd.read_csv(tmp_path / "run" / "fold_1" / "log.csv")) == tiny.epochs


def test_a_mistake_in_a_worker_is_not_told_as_a_killed_process(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(self: TrainBatches, index: int) -> None:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(TrainBatches, "__getitem__", mistaken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        room.train(tmp_path / "run", "tiny", tiny, store, folds, [1])


def out_of_a_gpus_memory(*_: object) -> float:
    """Raise what torch raises where a GPU's memory is full."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_memory(*_: object) -> float:
    """Ask torch for more memory than there is."""
    return float(torch.empty(2**50)[0])


@pytest.mark.parametrize("epoch", [out_of_a_gpus_memory, out_of_memory])
def test_a_batch_that_memory_does_not_hold_is_one_error(
    epoch: Callable[..., float],
    store: PatchStore,
    folds: Folds,
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "train_epoch", epoch)
    with pytest.raises(UserError, match=r"^batch_size=8: the device's memory does not hold it; use a smaller one$"):
        room.train(tmp_path / "run", "tiny", tiny, store, folds, [1])


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


def test_each_epoch_takes_every_patch_once_in_a_new_order(store: PatchStore, folds: Folds, tiny: Config) -> None:
    config = replace(tiny, side=96, shift=0, stain_jitter=0.0, color_jitter=0.0)
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
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    optimizer: str, store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, epochs=3, optimizer=optimizer, width=16)
    train_fold(tmp_path / "whole", config, store, folds.table, 0, CPU)

    class Stop(Exception):
        pass

    def stop_in_the_second_epoch(learner, source, steps, epoch, config):  # noqa: ANN001, ANN202
        if epoch == 1:
            raise Stop
        return engine.train_epoch(learner, source, steps, epoch, config)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(room, "train_epoch", stop_in_the_second_epoch)
        train_fold(tmp_path / "stopped", config, store, folds.table, 0, CPU)
    assert len(pd.read_csv(tmp_path / "stopped" / "log.csv")) == 1
    train_fold(tmp_path / "stopped", config, store, folds.table, 0, CPU)
    for name in ("best.pt", "last.pt"):
        whole, stopped = (checkpoint.load(tmp_path / run / name)["net"] for run in ("whole", "stopped"))
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    logs = [pd.read_csv(tmp_path / run / "log.csv")[["epoch", "lr", "train_loss", "valid_auc"]] for run in ("whole", "stopped")]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


def test_folds_on_two_devices_are_those_of_one(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, epochs=1)
    for run, devices in (("one", 1), ("two", 2)):
        monkeypatch.setattr(device, "gpus", lambda devices=devices: devices)
        room.train(tmp_path / run, "tiny", config, store, folds, [0, 1, 2])
        predict(tmp_path / run, config, store, folds, [0, 1, 2])
    for name in ("oof.csv", "test.csv"):
        for fold in range(3):
            assert (tmp_path / "one" / f"fold_{fold}" / name).read_bytes() == (
                tmp_path / "two" / f"fold_{fold}" / name
            ).read_bytes()


def test_a_device_that_fails_in_its_own_process_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpus", lambda: 2)
    with pytest.raises(UserError, match=r"^fold 1$"):
        device.spread(_refuse, [0, 1])


def test_what_a_killed_process_has_started_ends_with_it(tmp_path: Path) -> None:
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
from pcam_kaggle.training import device

def work(share):
    Path(str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    device.gpus = lambda: 2
    device.spread(work, [0, 1])
"""


def test_a_gpus_process_that_is_killed_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpus", lambda: 2)
    with pytest.raises(UserError, match=r"^a process of a GPU was killed"):
        device.spread(_die, [0, 1])


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


def test_training_ends_with_the_budget_and_goes_on_from_there(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Clock:
        """A budget that ends after `epochs` epochs."""

        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def left(self) -> float:
            return 1e6 if logged_epochs(tmp_path / "run") < self.epochs else -1.0

    def logged_epochs(run: Path) -> int:
        return sum(len(read_log(run / f"fold_{fold}")) for fold in range(3))

    config = replace(tiny, epochs=2)
    room.train(tmp_path / "run", "tiny", config, store, folds, [0, 1, 2], Clock(3))
    said = capsys.readouterr().out
    assert [trained(tmp_path / "run" / f"fold_{fold}") for fold in range(3)] == [True, False, False]
    assert logged_epochs(tmp_path / "run") == 3
    assert "the time is over, in fold 1" in said
    assert "folds 0, 1, 2 need" in said
    room.train(tmp_path / "run", "tiny", config, store, folds, [1, 2])
    room.train(tmp_path / "whole", "tiny", config, store, folds, [0, 1, 2])
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
        assert fit in _forecast(list(range(len(left))), left, 90, 60, hour)


@pytest.mark.parametrize("broken", ["best.pt", "log.csv"])
def test_a_stop_between_two_files_is_made_good(
    broken: str, store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path
) -> None:
    config = replace(tiny, epochs=1)
    train_fold(tmp_path / "fold", config, store, folds.table, 0, CPU)
    before = {name: (tmp_path / "fold" / name).read_bytes() for name in ("log.csv", "metrics.json")}
    for name in (broken, "metrics.json"):
        (tmp_path / "fold" / name).unlink()
    train_fold(tmp_path / "fold", config, store, folds.table, 0, CPU)
    assert {name: (tmp_path / "fold" / name).read_bytes() for name in before} == before
    assert checkpoint.load(tmp_path / "fold" / "best.pt")["epoch"] == 1


def test_best_reloaded_gives_the_stored_auc(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    train_fold(tmp_path / "fold_2", tiny, store, folds.table, 2, CPU)
    valid = folds.table[folds.table["fold"] == 2]
    net = load_best(tmp_path / "fold_2", tiny, CPU)
    rows = store.rows("train", valid["id"].to_numpy())
    logits = predict_logits(net, store, rows, tiny, CPU, 1, "test")[0].double().numpy()
    stored = read_json(tmp_path / "fold_2" / "metrics.json")["valid_auc"]
    assert auc(valid["label"].to_numpy(), logits) == stored
    assert stored == pd.read_csv(tmp_path / "fold_2" / "log.csv")["valid_auc"].max()


def test_tensorboard_sees_the_log(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_fold(tmp_path / "fold_0", tiny, store, folds.table, 0, CPU)
    seen = events.EventAccumulator(str(tmp_path / "fold_0" / "events")).Reload()
    log = pd.read_csv(tmp_path / "fold_0" / "log.csv")
    for name in ("valid_auc", "train_loss", "lr"):
        points = seen.Scalars(name)
        assert [point.step for point in points] == log["epoch"].tolist()
        np.testing.assert_allclose([point.value for point in points], log[name], rtol=1e-6)


def test_another_config_does_not_go_on_in_the_same_folder(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path
) -> None:
    open_run(tmp_path / "run", "tiny", tiny, store, folds)
    with pytest.raises(UserError, match=r"lr \(0.002 → 0.1\)"):
        check_run(tmp_path / "run", replace(tiny, lr=0.1), store, folds)


def test_a_loss_that_is_not_finite_stops_with_what_led_to_it(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Config, weights: bool) -> torch.nn.Module:
        net = create(config)
        torch.nn.init.constant_(net.head[-1].bias, torch.inf)
        return net

    monkeypatch.setattr(room, "create", broken)
    with pytest.raises(UserError, match=r"epoch 1, step 1: the loss is .* smaller lr"):
        train_fold(tmp_path / "fold_0", tiny, store, folds.table, 0, CPU)
    assert not list((tmp_path / "fold_0").glob("*.pt"))


def test_validation_logits_that_are_not_finite_are_one_line(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "predict_logits", lambda net, store, rows, *_: torch.full((1, len(rows)), torch.nan))
    with pytest.raises(UserError, match="fold 1: a validation logit is not finite"):
        next(fold_epochs(tmp_path / "fold_1", tiny, store, folds.table, 1, CPU))


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_the_learning_rate_rises_once_and_falls_once(schedule: str) -> None:
    config = replace(Config(), schedule=schedule, epochs=10, warmup_epochs=2.0, lr=1.0)
    rates = np.array([learning_rate(config, progress) for progress in np.linspace(0, 10, 501)])
    top = int(rates.argmax())
    assert rates.max() == pytest.approx(1.0, abs=1e-3)
    assert (np.diff(rates[: top + 1]) >= 0).all()
    assert (np.diff(rates[top:]) <= 0).all()
    assert rates[-1] == pytest.approx(0.01 if schedule == "cosine" else 1e-4)


def test_one_cycle_is_torchs() -> None:
    config = replace(Config(), schedule="onecycle", epochs=1, warmup_epochs=0.0, lr=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=101, pct_start=0.31, div_factor=25, final_div_factor=400
    )
    for step in range(101):
        ours = learning_rate(config, (step + 0.3) / 100 if step < 30 else step / 100)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=0.02)
        optimizer.step()
        reference.step()


def test_the_average_forgets_its_start_and_keeps_a_horizon() -> None:
    config = replace(Config(), average_epochs=2.0)
    net, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(net.weight, 3.0)
    follow(average, net, average_weight(config, 10, 0))
    assert torch.equal(average.weight, net.weight)
    assert average_weight(config, 10, 10_000) == pytest.approx(1 / 20)
    assert average_weight(replace(config, average_epochs=0.0), 10, 10_000) == 1


def test_averaging_includes_the_norms_statistics() -> None:
    net, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    net(torch.randn(8, 2) + 5)
    follow(average, net, 0.5)
    torch.testing.assert_close(average.running_mean, net.running_mean / 2)
    assert average.num_batches_tracked == net.num_batches_tracked == 1


def test_a_net_without_norms_is_averaged_too() -> None:
    net, average = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    follow(average, net, 1.0)
    assert torch.equal(average.weight, net.weight)


def test_a_damaged_checkpoint_is_said(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.pt", {"net": {"weight": torch.zeros(100)}})
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_the_head_warms_up_alone(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    config = replace(tiny, model="timm:resnet10t", head_epochs=1, epochs=2, layer_decay=0.5, average_epochs=0.0)
    torch.manual_seed(room._seed(config, 0, 0))
    fresh = dict(create(config).named_parameters())

    def changed(epochs: int) -> set[str]:
        train_fold(tmp_path / str(epochs), replace(config, epochs=epochs), store, folds.table, 0, CPU)
        after = checkpoint.load(tmp_path / str(epochs) / "last.pt")["net"]
        return {name for name, value in fresh.items() if not torch.equal(value, after[name])}

    assert changed(1) == {"net.fc.weight", "net.fc.bias"}
    both = changed(2)
    assert "net.layer4.0.conv1.weight" in both
    assert not any(name.startswith("net.conv1") for name in both), "a layer with less than a tenth of the rate moved"


def test_layers_learn_at_rates_that_fall_towards_the_input(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, *arguments):  # noqa: ANN002, ANN202
            rates.append([group["lr"] / group["lr_scale"] for group in self.param_groups])
            return super().step(*arguments)

    monkeypatch.setattr(room.torch.optim, "AdamW", Watched)
    config = replace(tiny, model="timm:resnet10t", layer_decay=0.8, epochs=1)
    train_fold(tmp_path / "fold_0", config, store, folds.table, 0, CPU)
    assert len(rates[0]) > 4
    expected = [learning_rate(config, (step + 1) / len(rates)) for step in range(len(rates))]
    np.testing.assert_allclose(np.array(rates), np.array(expected)[:, None].repeat(len(rates[0]), 1))


def test_a_teachers_answers_are_learnt_for_its_own_fold(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, teacher="old", epochs=1)
    with pytest.raises(UserError, match=r"old/fold_1/test.csv: no predictions of the teacher"):
        train_fold(tmp_path / "new" / "fold_1", config, store, folds.table, 1, CPU)
    (tmp_path / "old" / "fold_1").mkdir(parents=True)
    answers = pd.DataFrame({"id": store.ids("test")[::-1], "probability": np.linspace(0.1, 0.7, 7)})
    answers.to_csv(tmp_path / "old" / "fold_1" / "test.csv", index=False)
    seen = []
    monkeypatch.setattr(room, "batches", lambda data, *rest: seen.append(data) or batches(data, *rest))
    train_fold(tmp_path / "new" / "fold_1", config, store, folds.table, 1, CPU)
    learnt = dict(zip(seen[0].rows, seen[0].targets, strict=True))
    for name, probability in answers.itertuples(index=False):
        assert learnt[store.rows("test", np.array([name], object))[0]] == pytest.approx(probability)
    valid = store.rows("train", folds.table["id"][folds.table["fold"] == 1].to_numpy())
    assert not set(valid) & set(learnt)


def test_a_student_does_not_resume_with_another_teacher(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    teacher, student = tmp_path / "old", tmp_path / "new"
    config = replace(tiny, teacher="old")
    open_run(teacher, "tiny", tiny, store, folds)
    answers = pd.DataFrame({"id": store.ids("test"), "probability": np.linspace(0.1, 0.7, 7)})
    for fold in range(3):
        write_csv(teacher / f"fold_{fold}" / "test.csv", answers)
    room.train(student, "tiny", config, store, folds, [1])
    next(fold_epochs(student / "fold_0", config, store, folds.table, 0, CPU))
    write_csv(teacher / "fold_2" / "test.csv", answers.assign(probability=0.5))
    room.train(student, "tiny", config, store, folds, [2])
    write_csv(teacher / "fold_0" / "test.csv", answers.assign(probability=0.5))
    with pytest.raises(UserError, match="other predictions of its teacher old"):
        room.train(student, "tiny", config, store, folds, [0])
    write_csv(teacher / "fold_0" / "test.csv", answers)
    room.train(student, "tiny", config, store, folds, [0])
    shutil.rmtree(teacher)
    check_run(student, config, store, folds)


def test_a_student_whose_teacher_was_not_recorded_does_not_resume(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path
) -> None:
    answers = pd.DataFrame({"id": store.ids("test"), "probability": np.linspace(0.1, 0.7, 7)})
    write_csv(tmp_path / "old" / "fold_1" / "test.csv", answers)
    fold = tmp_path / "new" / "fold_1"
    next(fold_epochs(fold, replace(tiny, teacher="old"), store, folds.table, 1, CPU))
    (fold / "teacher.json").unlink()
    with pytest.raises(UserError, match=r"teacher.json: missing, so the teacher may have changed"):
        next(fold_epochs(fold, replace(tiny, teacher="old"), store, folds.table, 1, CPU))


def test_folds_of_a_run_start_from_the_same_weights(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    timm, file, run = import_timm(), tmp_path / "weights.pth", tmp_path / "run"
    config = replace(tiny, model="timm:mobilenetv3_small_050", weights=str(file), epochs=1, warmup_epochs=0)
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), file)
    room.train(run, "tiny", config, store, folds, [0])
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), file)
    with pytest.raises(UserError, match="its other folds started from other weights"):
        room.train(run, "tiny", config, store, folds, [1])
    file.unlink()
    room.train(run, "tiny", config, store, folds, [0])


def test_every_session_that_works_on_a_run_is_recorded(
    store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(room, "find_device", lambda: "cuda")
    monkeypatch.setattr(room, "spare_cores", lambda: None)
    monkeypatch.setattr(room, "choose", lambda *_: Backend("cuda", "fp16", "channels_last"))
    monkeypatch.setattr(room, "device_name", lambda kind: f"a {kind}")
    on_gpu = room.run_backend(run, tiny, store)
    monkeypatch.undo()
    room.train(run, "tiny", tiny, store, folds, [0])
    room.train(run, "tiny", tiny, store, folds, [1])
    first, second = read_environments(run)
    assert (first["device"], first["backend"]["precision"]) == ("a cuda", on_gpu.precision)
    assert second["backend"]["kind"] == "cpu"
    monkeypatch.setattr(room, "session_start", lambda: "another day")
    room.train(run, "tiny", tiny, store, folds, [2])
    assert [entry["started"] for entry in read_environments(run)][-1] == "another day"
    assert len(read_environments(run)) == 3


def test_an_environment_of_one_session_is_read_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"backend": {"kind": "cpu"}}')
    assert read_environments(tmp_path) == [{"backend": {"kind": "cpu"}}]
    (tmp_path / "environment.json").write_text('[{"device": 3}]')
    with pytest.raises(UserError, match=r"environment.json: not what this version writes"):
        read_environments(tmp_path)


@pytest.mark.parametrize("symmetry", ["none", "d4"])
def test_norms_take_the_statistics_of_what_is_predicted(store: PatchStore, tiny: Config, symmetry: str) -> None:
    config = replace(tiny, symmetry=symmetry, width=16, max_width=32)
    net = create(config)
    rows = store.rows("train", store.ids("train"))
    images = CPU.images(torch.from_numpy(engine.centre(store.images(rows), config.side)))
    before = {name: value.clone() for name, value in net.named_parameters()}
    engine.adapt_norms(net, store, rows, config, CPU)
    stem = net.eval().streams[0].stem
    with torch.no_grad():
        normed = stem[2](stem[1](stem[0](net.normalize(images))))
    groups = normed if symmetry == "none" else normed.unflatten(1, (8, -1)).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(groups.mean((0, 2, 3)), torch.zeros(groups.shape[1]), atol=2e-3, rtol=0)
    torch.testing.assert_close(groups.std((0, 2, 3)), torch.ones(groups.shape[1]), atol=2e-2, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_a_teacher_with_other_folds_is_refused(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> None:
    other = Folds(folds.table, folds.manifest | {"csv_sha256": "0" * 64})
    open_run(tmp_path / "old", "tiny", tiny, store, other)
    with pytest.raises(UserError, match="the teacher has other folds"):
        room.train(tmp_path / "new", "tiny", replace(tiny, teacher="old"), store, folds, [0])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="not a path"):
        replace(tiny, teacher="../old")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these options")
def test_freed_memory_is_held_for_the_next_step() -> None:
    code = """
import resource, torch
from pcam_kaggle.config.process import hold_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = [faults() for _ in range(5)][-1]
hold_memory()
held = [faults() for _ in range(12)][-1]
print(given_back > 1000, held < 100)
"""
    # Huge pages are faulted in by the hundred, and would hide what is given back.
    small_pages = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=small_pages).stdout
    assert said == "True True\n"
