"""The pipeline through the command line, on a small set and on real patches."""

import itertools
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, Outcome
from pytest import MonkeyPatch

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.experiments import EXPERIMENTS, Experiment
from pcam_kaggle.core.files import file_sha256, read_json
from pcam_kaggle.core.paths import COMPETITION, Data, find_data, find_workspace
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.pipeline.stages import STAGES
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training.budget import Budget

Command = Callable[..., Outcome]


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the modification time and SHA-256 of every file below `folder`, by path."""
    return {str(path): (path.stat().st_mtime_ns, file_sha256(path)) for path in folder.rglob("*") if path.is_file()}


def test_stages_leave_what_they_promise(data: Data, pcam: Command, tmp_path: Path) -> None:
    # `train` has predicted, too.
    for stage, following in itertools.pairwise([stage for stage in STAGES if stage != "predict"] + [""]):
        outcome = pcam(stage)
        assert outcome.status == 0, outcome.err
        expected = f"next: python -m pcam_kaggle {following} --data " if following else "next: submit "
        assert outcome.out.splitlines()[-1].startswith(expected)
    work, run = tmp_path / "work", "runs/bottleneck"
    files = [path.relative_to(work) for path in work.rglob("*") if path.is_file()]
    fold_files = {"best.pt", "last.pt", "log.csv", "metrics.json", "oof.csv", "test.csv", "predictions.json"}
    assert {str(path) for path in files if path.suffix != ".lock"} == {
        *("store/patches.npy", "store/index.csv", "store/manifest.json"),
        *("folds/stratified_3_42.csv", "folds/stratified_3_42.json"),
        *(f"{run}/{name}" for name in ("config.json", "environment.json", "oof.csv", "test.csv", "metrics.json")),
        *(f"{run}/fold_{fold}/{name}" for fold in range(3) for name in fold_files),
        *("submissions/bottleneck.csv", "submissions/bottleneck.json", "submissions/ledger.csv"),
    }
    oof, labels = pd.read_csv(work / run / "oof.csv"), pd.read_csv(data.labels)
    assert sorted(oof["id"]) == sorted(labels["id"])
    assert oof.merge(labels, on="id").eval("label_x == label_y").all()
    pooled = read_json(work / run / "metrics.json")["pooled"]["value"]
    assert pooled == auc(oof["label"].to_numpy(), oof["probability"].to_numpy())


def test_given_folds_are_used_in_place_of_drawn_ones(data: Data, pcam: Command, tmp_path: Path) -> None:
    file, run = tmp_path / "given.csv", Run(tmp_path / "work/runs/given")
    folds = pd.read_csv(data.labels)[["id"]].assign(fold=np.arange(36) % 2)
    folds.to_csv(file, index=False)
    given = ("--name", "given", "--fold-file", str(file))
    assert "folds: n_splits=2, as in" in pcam("pipeline", *given).out
    assert (run.made_from().config["n_splits"], run.made_from().folds[:6]) == (2, "given_")
    assert run.oof()[["id", "fold"]].equals(folds.sort_values("id", ignore_index=True))
    folds[::-1].to_csv(file, index=False)
    assert "nothing to do" in pcam("pipeline", *given).out
    assert f"--fold-file {file}" in pcam("folds", *given).out.splitlines()[-1]
    assert "can't be combined with --slides or groups=none" in pcam("folds", *given, "--groups", "none").err


def test_the_printed_commands_lead_from_one_fold_to_its_submission(pcam: Command, tmp_path: Path) -> None:
    assert pcam("prepare").status == pcam("folds").status == 0
    stages, arguments = [], ["train", "--folds", "2"]
    while arguments:
        printed = pcam(*arguments)
        assert printed.status == 0, printed.err
        stages.append(arguments[0])
        _, _, command = printed.out.splitlines()[-1].partition("next: python -m pcam_kaggle ")
        arguments = shlex.split(command)
    assert stages == ["train", "blend", "submission"]
    assert (tmp_path / "work/submissions/bottleneck-folds-2.csv").exists()
    # The other folds, one after the other.
    assert pcam("pipeline", "--folds", "1").out.splitlines()[-1] == "next: folds 0, then the blend"
    assert pcam("blend").status == 2
    assert pcam("pipeline").status == 0
    assert (tmp_path / "work/submissions/bottleneck.csv").exists()


def test_folds_unfinished_at_the_time_limit_are_left_out(pcam: Command, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    run, submissions = Run(tmp_path / "work/runs/bottleneck"), tmp_path / "work/submissions"
    assert "no fold was finished in time" in pcam("pipeline", "--hours", "0.001").out.splitlines()[-1]
    assert not submissions.exists()
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "left", lambda _: -1.0 if run.fold(1).is_trained else 1e6)
        outcome = pcam("pipeline", "--hours", "1")
    assert outcome.status == 0, outcome.err
    assert "missing: fold 2, not finished" in outcome.out
    part = submissions / "bottleneck-folds-0-1.csv"
    assert read_json(part.with_suffix(".json"))["missing_folds"] == [2]
    tests = [pd.read_csv(run.folder / f"fold_{fold}" / "test.csv").set_index("id") for fold in (0, 1)]
    mean = sum(tests)["probability"] / 2
    pd.testing.assert_series_equal(pd.read_csv(part).set_index("id")["label"], mean, check_like=True, check_names=False)
    assert pcam("pipeline").status == 0
    assert read_json(submissions / "bottleneck.json")["missing_folds"] == []
    assert part.exists()


def test_a_changed_test_set_is_predicted_again(data: Data, pcam: Command, finished_run: Path) -> None:
    sample = pd.read_csv(data.sample)
    (data.patches("test") / f"{sample['id'][0]}.tif").unlink()
    sample.iloc[1:].to_csv(data.sample, index=False)
    assert "holds another submission" in pcam("pipeline").err
    assert len(pd.read_csv(finished_run / "runs" / "bottleneck" / "test.csv")) == 6


def test_another_config_needs_another_name(pcam: Command, finished_run: Path) -> None:
    run = finished_run / "runs" / "bottleneck"
    assert "lr (0.004 → 0.5)" in pcam("train", "--set", "lr=0.5", "--folds", "0").err
    assert pcam("train", "--set", "lr=0.5", "--folds", "0", "--name", "faster").status == 0
    assert (run.with_name("faster") / "fold_0" / "best.pt").exists()
    (run / "config.json").unlink()
    assert "config.json: missing, but there are folds beside it" in pcam("pipeline", "--set", "lr=0.5").err


@pytest.mark.parametrize(
    ("stored", "arguments", "status", "printed"),
    [
        # A field that was added later has its default.
        ({"chroma_blur": None}, [], 0, "nothing to do"),
        ({"chroma_blur": None}, ["--set", "chroma_blur=1"], 2, "chroma_blur (0.0 → 1.0)"),
        ({"depth": 1}, [], 2, "holds a run with other depth (no longer a field); use --name"),
        ({"probe": None, "optimizer": "logistic"}, [], 2, "probe (True → False)"),
    ],
)
def test_runs_of_other_versions(
    stored: dict[str, Any], arguments: list[str], status: int, printed: str, pcam: Command, finished_run: Path
) -> None:
    file = finished_run / "runs" / "bottleneck" / "config.json"
    made = read_json(file)
    made["config"] = {key: value for key, value in (made["config"] | stored).items() if value is not None}
    file.write_text(json.dumps(made))
    outcome = pcam("pipeline", *arguments)
    assert outcome.status == status, outcome.err
    assert printed in outcome.out + outcome.err


def test_the_ledger_has_a_row_per_submission_and_keeps_scores(pcam: Command, finished_run: Path) -> None:
    def record(*arguments: str) -> int:
        return main(["kaggle", "scores", *arguments, "--work", str(finished_run)])

    assert record("bottleneck", "--public", "0.91") == 0
    assert pcam("pipeline", "--name", "again").status == 0
    assert record("bottleneck", "--private", "0.89") == 0
    table = pd.read_csv(finished_run / "submissions" / "ledger.csv").set_index("name")
    scores = ["public_score", "private_score"]
    assert table.loc["bottleneck", scores].tolist() == [0.91, 0.89]
    assert table.loc["again", scores].isna().all()
    assert list(table.index) == ["again", "bottleneck"]
    metrics = read_json(finished_run / "runs" / "bottleneck" / "metrics.json")
    assert table.loc["bottleneck", "oof_low"] == metrics["pooled"]["low"]
    assert record("unheard", "--public", "0.9") == record("again", "--public", "9") == 2


def test_a_slide_map_beside_the_labels_is_used(data: Data, pcam: Command) -> None:
    ids = pd.read_csv(data.labels)["id"]
    slides = pd.DataFrame({"id": ids, "wsi": [f"slide_{n % 12}" for n in range(len(ids))]})
    slides.to_csv(data.root / "patch_id_wsi.csv", index=False)
    outcome = pcam("pipeline")
    assert outcome.status == 0, outcome.err
    assert "folds/slides_3_42.csv\nfolds: no mapped slide is in two folds" in outcome.out
    warning = "folds may share slides"
    assert warning not in outcome.out
    assert warning in pcam("pipeline", "--groups", "none", "--name", "by_label").out


def test_subsets_and_the_whole_set_lie_side_by_side(data: Data, pcam: Command, finished_run: Path) -> None:
    before = {folder: contents(finished_run / folder) for folder in ("store", "runs/bottleneck")}
    assert pcam("pipeline", "--subset", "18").status == 0
    assert {folder: contents(finished_run / folder) for folder in before} == before
    for arguments in ([], ["--subset", "18"], ["--set", "subset=18"]):
        outcome = pcam("pipeline", *arguments)
        assert outcome.out.splitlines()[-1].startswith("nothing to do")
    table = pd.read_csv(finished_run / "folds" / "stratified_3_42_subset18.csv")
    assert PatchStore(finished_run / "store-subset18").ids("train").tolist() == table["id"].tolist()
    assert (len(table), table["label"].sum()) == (18, pd.read_csv(data.labels)["label"].sum() / 2)
    for arguments in (["pipeline", "--name", "bottleneck"], ["blend", "bottleneck", "bottleneck-subset18", "--name", "both"]):
        outcome = pcam(*arguments, "--subset", "18")
        assert (outcome.status, outcome.err.count("\n")) == (2, 1)
        assert "other folds" in outcome.err


def test_ids_and_slides_that_look_like_something_else_survive_every_table(
    data: Data, pcam: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ["NA", "null", "None", "nan", "1e5", "007", "True"]
    for split in ("train", "test"):
        rows = data.table(split).read_text().splitlines()
        for number, name in enumerate(odd, 1):
            old, label = rows[number].split(",")
            (data.patches(split) / f"{old}.tif").rename(data.patches(split) / f"{name}.tif")
            rows[number] = f"{name},{label}"
        data.table(split).write_text("\n".join(rows))
    ids = [[row.split(",")[0] for row in data.table(split).read_text().splitlines()] for split in ("train", "test")]
    (data.root / "patch_id_wsi.csv").write_text("id,wsi\n" + "".join(f"{n},{odd[k % 7]}\n" for k, n in enumerate(ids[0][1:])))
    for command in (["pipeline", "--ids", "names"], ["blend", "bottleneck", "--name", "other"]):
        assert pcam(*command).status == 0
    run = Run(tmp_path / "work" / "runs" / "bottleneck")
    assert sorted(run.oof()["id"]) == sorted({*ids[0]} - {"id"})
    submission = (tmp_path / "work/submissions/bottleneck.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in submission] == ids[1]
    assert main(["compare", "--work", str(tmp_path / "work"), "--slides", str(data.slides())]) == 0
    printed = capsys.readouterr()
    assert ("unit: slide" in printed.out, "not paired" in printed.out, printed.err) == (True, False, "")


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["train"], "prepare"),
        (["prepare", "--subset", "36"], "fewer than the 36 train patches"),
        (["prepare", "--subset", "1"], "enough for both labels"),
        (["prepare", "--subset", "-1"], "subset=-1: must be in [0, "),
        (["prepare", "--name", "../up"], "../up"),
        (["pipeline", "--folds", "0,7"], "7"),
        (["folds", "--set", "groups=slides"], "--slides"),
        (["folds", "--slides", "nowhere.csv"], "nowhere.csv"),
        (["prepare", "--data", "nowhere"], "nowhere/train_labels.csv: no such file"),
        (["blend", "one", "two"], "one"),
        (["blend", "one", "two", "--seeds", "2"], "--seeds 2: trains runs"),
        (["predict", "--name", "typo"], "prepare"),
        (["submission"], "not blended"),
        (["pipeline", "--set", "n_blocks=9"], "at most 4 fit"),
        (["pipeline", "--set", "model=timm:vit_tiny_patch16_2"], "it has vit_tiny_patch16_224"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_run(arguments: list[str], printed: str, pcam: Command, tmp_path: Path) -> None:
    outcome = pcam(*arguments)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert printed in outcome.err
    assert outcome.err.startswith("error: ")
    assert not (tmp_path / "work" / "runs").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("store/manifest.json", "store/index.csv", "store/patches.npy"),
        *("folds/stratified_3_42.csv", "folds/stratified_3_42.json"),
        *("submissions/bottleneck.json", "submissions/ledger.csv"),
        *(f"runs/bottleneck/{name}" for name in ("config.json", "environment.json", "oof.csv", "test.csv", "metrics.json")),
        *(f"runs/bottleneck/fold_1/{name}" for name in ("best.pt", "metrics.json", "oof.csv", "test.csv", "predictions.json")),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "empty", "delete"])
def test_a_damaged_file_is_written_again_or_named(name: str, damage: str, pcam: Command, finished_run: Path) -> None:
    target, file = finished_run / "submissions/bottleneck.csv", finished_run / name
    submission, content = target.read_bytes(), file.read_bytes()
    file.unlink()
    if damage != "delete":
        file.write_bytes(b"{}" if damage == "empty" else content[: len(content) // 2])
    outcome = pcam("pipeline")
    if outcome.status == 0:
        assert target.read_bytes() == submission
    else:
        assert outcome.status == 2
        assert file.name in outcome.err or file.parent.name in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["pipelin"], ["train", "--folds", "a"], ["blend", "--method", "best"], []])
def test_a_wrong_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_kaggles_mounts_are_found_in_both_layouts(tmp_path: Path) -> None:
    assert find_data(None, tmp_path, tmp_path) is None
    folders = [tmp_path / parent / COMPETITION for parent in ("data", "input", "input/competitions")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "train_labels.csv").touch()
        assert find_data(None, tmp_path, tmp_path) == Data(folder)
    assert find_data(str(folders[0]), tmp_path, tmp_path) == Data(folders[0])
    (tmp_path / "working").mkdir()
    assert find_workspace(None, tmp_path).store == tmp_path / "temp" / "store"


@pytest.mark.slow
def test_the_demo_keeps_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [part for field in (*TINY, "tta=1", "epochs=1") for part in ("--set", field)]
    assert main(["pipeline", "--demo", "--work", str(tmp_path), *fields]) == 0
    assert "mean nothing for Kaggle" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(pd.read_csv(tmp_path / "demo" / "submissions" / "demo-not-for-kaggle.csv")) == 120


@pytest.mark.slow
def test_real_patches_are_what_their_ids_say_and_a_model_learns_from_them(real: Data, tmp_path: Path) -> None:
    assert prepare(real, tmp_path / "store")[0].ids == "sha1"
    fields = ["side=64", "n_blocks=3", "epochs=2", "tta=1", "average_epochs=0.5"]
    options = [part for field in fields for part in ("--set", field)]
    for stage, *chosen in (["folds"], ["train", "--folds", "0"], ["predict", "--folds", "0"]):
        assert main([stage, "--data", str(real.root), "--work", str(tmp_path), *options, *chosen]) == 0
    oof = pd.read_csv(tmp_path / "runs" / "bottleneck" / "fold_0" / "oof.csv")
    labels, store = oof["label"].to_numpy(), PatchStore(tmp_path / "store")
    by_colour = auc(labels, -store.images(store.rows("train", oof["id"].to_numpy())).mean((1, 2, 3)))
    assert auc(labels, oof["probability"].to_numpy()) > max(0.85, by_colour + 0.05)


@pytest.fixture
def run_stage(data: Data, tiny: Config, tmp_path: Path, monkeypatch: MonkeyPatch, capsys: Any) -> Command:
    """Return a function that runs a stage of the experiments `one`, `two` or their blend `both`, without other settings."""
    for name, config in (("one", tiny), ("two", replace(tiny, seed=43))):
        monkeypatch.setitem(EXPERIMENTS, name, Experiment("", config))
    monkeypatch.setitem(EXPERIMENTS, "both", Experiment("", tiny, members=("one", "two")))

    def call(stage: str, name: str, *arguments: str) -> Outcome:
        capsys.readouterr()
        status = main([stage, "-e", name, "--data", str(data.root), "--work", str(tmp_path / "work"), *arguments])
        return Outcome(status, *capsys.readouterr())

    return call


def test_an_experiment_that_blends_trains_its_members_once(run_stage: Command, tmp_path: Path) -> None:
    runs = tmp_path / "work" / "runs"
    assert run_stage("pipeline", "one").status == 0
    alone = contents(runs / "one")
    for stage in ("train", "predict", "blend"):
        assert run_stage(stage, "both", "--folds", "0,1").status == 0
    assert read_json(runs / "two" / "metrics.json")["missing_folds"] == [2]
    assert run_stage("pipeline", "both").status == 0
    assert contents(runs / "one") == alone
    tables = [pd.read_csv(runs / name / "oof.csv")["probability"] for name in ("one", "two", "both")]
    np.testing.assert_allclose(tables[2], (tables[0] + tables[1]) / 2, atol=1e-12)
    before = contents(tmp_path / "work")
    assert run_stage("pipeline", "both").out.splitlines()[-1].startswith("nothing to do: ")
    assert contents(tmp_path / "work") == before
    assert "a blend of one, two has no settings of its own" in run_stage("train", "both", "--set", "epochs=3").err
    message = "error: --name two: is a run that both blends (one, two); choose another name\n"
    assert run_stage("pipeline", "both", "--name", "two") == (2, "", message)


def test_a_member_not_begun_in_time_is_left_out(run_stage: Command, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "left", lambda _: -1.0 if (work / "runs/one/fold_2/metrics.json").exists() else 1e6)
        assert "missing: run two, not finished in time" in run_stage("pipeline", "both", "--hours", "1").out
    assert {path.name for path in (work / "submissions").glob("*.csv")} == {"both-without-two.csv", "ledger.csv"}
    assert read_json(work / "runs/both-without-two/metrics.json")["members"] == {"one": 1.0}
    assert run_stage("pipeline", "both").status == 0
    assert (work / "submissions" / "both.csv").exists()


def test_a_teacher_is_trained_before_its_student(
    run_stage: Command, tiny: Config, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "student", Experiment("", replace(tiny, teacher="one")))
    runs = tmp_path / "work" / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "left", lambda _: -1.0 if (runs / "one/fold_0/metrics.json").exists() else 1e6)
        assert "missing: all of" in run_stage("pipeline", "student", "--subset", "30", "--hours", "1").out
    assert not (runs / "student-subset30").exists()
    assert run_stage("pipeline", "student", "--subset", "30").status == 0
    assert read_json(runs / "student-subset30" / "metrics.json")["members"] == {"student-subset30": 1.0}
    assert not (tmp_path / "work" / "submissions" / "one.csv").exists()
    # The teacher has the folds of its student, and no predictions.
    assert read_json(runs / "one" / "config.json")["config"]["subset"] == 30
    assert not (runs / "one" / "fold_0" / "predictions.json").exists()


@pytest.mark.parametrize("stage", ["pipeline", "train"])
def test_weights_that_a_later_member_lacks_are_missed_at_once(
    stage: str, run_stage: Command, tiny: Config, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    lacking = replace(tiny, model="timm:resnet18", weights="nowhere.pth")
    monkeypatch.setitem(EXPERIMENTS, "two", Experiment("", lacking))
    assert run_stage(stage, "both").err.startswith("error: weights=nowhere.pth: no such file or folder")
    # Not even the patches were packed.
    assert not list((tmp_path / "work").glob("*"))


def test_what_is_about_to_be_trained_is_rehearsed_once(pcam: Command, monkeypatch: MonkeyPatch) -> None:
    rehearsed: list[Config] = []
    monkeypatch.setattr("pcam_kaggle.training.train.rehearse", rehearsed.append)
    for arguments in (["--folds", "0"], ["--folds", "0"], []):
        assert pcam("pipeline", "--seeds", "2", "--set", "epochs=1", *arguments).status == 0
    # The second command finds everything trained.
    assert [config.seed for config in rehearsed] == [42, 42]


def test_folds_of_like_stain(pcam: Command, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    few = "error: groups=stain: 36 train patches are too few for 50 groups; use groups=none\n"
    assert pcam("pipeline", "--groups", "stain").err == few
    monkeypatch.setattr("pcam_kaggle.data.folds.STAIN_GROUPS", 6)
    assert pcam("pipeline", "--groups", "stain").status == 0
    groups = pd.read_csv(tmp_path / "work" / "folds" / "stain_3_42.csv").groupby("group")["fold"].nunique()
    assert groups.tolist() == [1] * 6
    assert pcam("pipeline", "--groups", "stain").out.splitlines()[-1].startswith("nothing to do: ")
    assert "stain and --slides contradict" in pcam("folds", "--groups", "stain", "--slides", __file__).err


def test_several_seeds_are_trained_and_blended(tmp_path: Path, pcam: Command) -> None:
    arguments = ("--seeds", "2", "--set", "epochs=1")
    assert pcam("pipeline", *arguments).status == 0
    runs = tmp_path / "work" / "runs"
    names = ["bottleneck-seed42", "bottleneck-seed43"]
    assert [read_json(runs / name / "config.json")["config"]["seed"] for name in names] == [42, 43]
    assert read_json(runs / "bottleneck-seeds2" / "metrics.json")["members"] == dict.fromkeys(names, 0.5)
    *seeds, blended = (pd.read_csv(runs / name / "test.csv")["probability"] for name in (*names, "bottleneck-seeds2"))
    np.testing.assert_allclose(blended, sum(seeds) / 2)
    assert (tmp_path / "work" / "submissions" / "bottleneck-seeds2.csv").is_file()
    assert "nothing to do" in pcam("pipeline", *arguments).out
    assert "--seeds 2" in pcam("train", *arguments).out.splitlines()[-1]
