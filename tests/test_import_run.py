"""Import of a run: the newer state of a fold wins, and only valid files of a run are copied."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pcam_kaggle.cli.main import main
from pcam_kaggle.core import files
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import EXPERIMENTS, Experiment
from pcam_kaggle.core.files import PART, locked
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.runs import checkpoint, import_run
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.run import Run

RUN = Path("runs") / "bottleneck"


@pytest.fixture
def elsewhere(finished_run: Path, tmp_path: Path) -> Path:
    """Return a folder in which a run of three folds was trained and submitted."""
    return finished_run.rename(tmp_path / "elsewhere")


@pytest.fixture
def here(tmp_path: Path) -> Workspace:
    """Return an empty workspace."""
    return Workspace(tmp_path / "here", tmp_path / "here" / "store")


def change(file: Path, **values: object) -> None:
    """Set `values` in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_of_two_states_of_a_fold_the_further_one_is_kept(elsewhere: Path, here: Workspace, tmp_path: Path) -> None:
    early = tmp_path / "early"
    shutil.copytree(elsewhere, early)
    shutil.rmtree(early / RUN / "fold_2")
    for name in ("metrics.json", "predictions.json", "oof.csv", "test.csv"):
        (early / RUN / "fold_1" / name).unlink()
    (early / RUN / "fold_1" / "best.pt").unlink()
    last, log = early / RUN / "fold_1" / "last.pt", early / RUN / "fold_1" / "log.csv"
    content = checkpoint.load(last)
    checkpoint.save(last, content | {"log": json.dumps(json.loads(content["log"])[:-1])})
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    change(early / RUN / "metrics.json", pooled="of two folds")
    assert import_runs(early, here) == ["bottleneck"]
    assert not (here.root / RUN / "fold_1" / "oof.csv").exists()
    import_runs(elsewhere, here)
    whole = {
        path.relative_to(elsewhere): path.read_bytes() for path in (elsewhere / RUN).rglob("*.*") if "events" not in str(path)
    }
    assert {name: (here.root / name).read_bytes() for name in whole} == whole
    import_runs(early, here)
    assert {name: (here.root / name).read_bytes() for name in whole} == whole


def test_a_blend_and_its_submission_come_with_their_members(
    data: Data, tiny: Config, tmp_path: Path, here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "one", Experiment("", tiny))
    monkeypatch.setitem(EXPERIMENTS, "both", Experiment("", tiny, members=("one",)))
    assert main(["pipeline", "-e", "both", "--data", str(data.root), "--work", str(tmp_path / "elsewhere")]) == 0
    assert import_runs(tmp_path / "elsewhere", here) == ["both", "one"]
    for name in ("runs/both/oof.csv", "submissions/both.csv", "submissions/both.json"):
        assert (here.root / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()
    assert import_runs(tmp_path / "elsewhere", here) == []


def test_of_two_states_of_a_blend_the_one_of_more_folds_is_kept(
    data: Data, tiny: Config, tmp_path: Path, here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "one", Experiment("", tiny))
    monkeypatch.setitem(EXPERIMENTS, "both", Experiment("", tiny, members=("one",)))
    line = ["-e", "both", "--data", str(data.root), "--work", str(tmp_path / "elsewhere")]
    for stage in ("pipeline", "blend"):
        assert main([stage, *line, "--folds", "0,1"]) == 0
    assert import_runs(tmp_path / "elsewhere", here) == ["both", "one"]
    early = shutil.copytree(tmp_path / "elsewhere", tmp_path / "early")
    assert main(["pipeline", *line]) == 0
    assert import_runs(tmp_path / "elsewhere", here) == ["both", "one"]
    names = ("runs/both/oof.csv", "runs/both/metrics.json", "submissions/both.csv")
    whole = [(tmp_path / "elsewhere" / name).read_bytes() for name in names]
    assert [(here.root / name).read_bytes() for name in names] == whole
    assert import_runs(early, here) == []
    assert [(here.root / name).read_bytes() for name in names] == whole


@pytest.mark.parametrize("at", range(1, 28, 3))
def test_an_interrupted_import_is_completed_here_and_by_others(
    at: int, elsewhere: Path, here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying stops after `at` files: no fold is incomplete, and the import can be completed."""
    copied = []

    def end(source: Path, target: Path) -> None:
        if len(copied) == at:
            raise KeyboardInterrupt
        copied.append(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(import_run, "_copy", end)
        import_runs(elsewhere, here)
    whole = {"last.pt", "best.pt", "log.csv", "metrics.json", "predictions.json", "oof.csv", "test.csv"}
    assert all({path.name for path in fold.iterdir()} == whole for fold in (here.root / RUN).glob("fold_*"))
    third = Workspace(tmp_path / "third", tmp_path / "third" / "store")
    import_runs(here.root, third)
    names = [path.relative_to(elsewhere) for path in (elsewhere / RUN).rglob("*.*") if path.parent.name != "events"]
    names += [Path("folds") / "stratified_3_42.csv", Path("submissions") / "bottleneck.csv"]
    for completed in (third, here):
        import_runs(elsewhere, completed)
        assert [(completed.root / name).read_bytes() for name in names] == [(elsewhere / name).read_bytes() for name in names]
        assert not list(completed.root.rglob(f"*{PART}"))


def test_a_fold_without_its_best_checkpoint_is_taken_again(elsewhere: Path, here: Workspace) -> None:
    import_runs(elsewhere, here)
    best = here.root / RUN / "fold_1" / "best.pt"
    best.unlink()
    (best.parent / "notes.txt").write_text("mine")
    assert import_runs(elsewhere, here) == ["bottleneck"]
    assert best.read_bytes() == (elsewhere / RUN / "fold_1" / "best.pt").read_bytes()
    assert (best.parent / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_fold_is_not_lost_between_two_renames(replaced: bool, elsewhere: Path, here: Workspace) -> None:
    """A call was killed between moving the old fold away and deleting it."""
    import_runs(elsewhere, here)
    fold = here.root / RUN / "fold_1"
    (fold / "notes.txt").write_text("mine")
    old = fold.replace(fold.with_name(".fold_1.old"))
    if replaced:
        shutil.copytree(elsewhere / RUN / "fold_1", fold)
    import_runs(elsewhere, here)
    assert (fold / "notes.txt").read_text() == "mine"
    assert (fold / "best.pt").read_bytes() == (elsewhere / RUN / "fold_1" / "best.pt").read_bytes()
    assert not old.exists()


@pytest.mark.parametrize(("aucs", "taken"), [((0.8, 0.9), True), ((0.9, 0.8), False)])
def test_a_session_that_ended_before_its_best_checkpoint(
    aucs: tuple[float, float], taken: bool, elsewhere: Path, here: Workspace
) -> None:
    """The last checkpoint replaces the best one only if the last epoch is the best."""
    fold = elsewhere / RUN / "fold_1"
    for path in list(fold.iterdir()):
        if path.name not in ("last.pt", "log.csv"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    content = checkpoint.load(fold / "last.pt")
    rows = [row | {"valid_auc": auc} for row, auc in zip(json.loads(content["log"]), aucs, strict=True)]
    checkpoint.save(fold / "last.pt", content | {"log": json.dumps(rows)})
    import_runs(elsewhere, here)
    assert (here.root / RUN / "fold_1" / "last.pt").exists() == taken


def test_the_sessions_of_both_places_are_kept(elsewhere: Path, here: Workspace, tmp_path: Path) -> None:
    early = shutil.copytree(elsewhere, tmp_path / "early")
    shutil.rmtree(early / RUN / "fold_2")
    ours, theirs = Run(elsewhere / RUN).environments(), [{"backend": {"kind": "cuda"}, "started": "before"}]
    (early / RUN / "environment.json").write_text(json.dumps(theirs))
    import_runs(early, here)
    import_runs(elsewhere, here)
    assert Run(here.root / RUN).environments() == theirs + ours
    shutil.rmtree(here.root / RUN / "fold_1")
    import_runs(elsewhere, here)
    assert Run(here.root / RUN).environments() == theirs + ours


def test_a_hash_of_weights_that_one_place_lacks_is_no_other_config(elsewhere: Path, here: Workspace) -> None:
    import_runs(elsewhere, here)
    shutil.rmtree(here.root / RUN / "fold_1")
    change(here.root / RUN / "config.json", weights_sha256="0" * 64)
    assert import_runs(elsewhere, here) == ["bottleneck"]
    change(elsewhere / RUN / "config.json", weights_sha256="1" * 64)
    with pytest.raises(UserError, match="another config"):
        import_runs(elsewhere, here)


def test_nothing_is_imported_while_another_process_writes_there(
    elsewhere: Path, here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with locked(here.root / RUN), pytest.raises(UserError, match="another process is writing there"):
        import_runs(elsewhere, here)
    assert not (here.root / RUN).exists()


@pytest.mark.parametrize("name", ["folds/stratified_3_42.csv", "submissions/bottleneck.csv"])
def test_what_stands_here_otherwise_is_not_mixed_with_what_comes(name: str, elsewhere: Path, here: Workspace) -> None:
    (here.root / name).parent.mkdir(parents=True)
    (here.root / name).write_text("id,label,fold\n")
    with pytest.raises(UserError, match=r"differs from"):
        import_runs(elsewhere, here)
    assert not (here.root / RUN).exists()


def no_plain_name(folder: Path) -> None:
    change(folder / RUN / "config.json", folds="../../outside")


def unknown_field(folder: Path) -> None:
    config = json.loads((folder / RUN / "config.json").read_text())["config"]
    change(folder / RUN / "config.json", config=config | {"unheard_of": 1})


def out_of_range(folder: Path) -> None:
    config = json.loads((folder / RUN / "config.json").read_text())["config"]
    change(folder / RUN / "config.json", config=config | {"n_splits": 10**9})


def linked(folder: Path) -> None:
    file = folder / RUN / "fold_0" / "oof.csv"
    file.rename(folder / "oof.csv")
    file.symlink_to(folder / "oof.csv")


def other_submission(folder: Path) -> None:
    file = folder / "submissions" / "bottleneck.csv"
    file.write_text(file.read_text().replace("0.4", "0.9"))


def pickled(folder: Path) -> None:
    (folder / RUN / "fold_0" / "best.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")


@pytest.mark.parametrize("damage", [no_plain_name, unknown_field, out_of_range, linked, other_submission, pickled])
def test_what_is_no_run_stays_outside(damage: Callable[[Path], None], elsewhere: Path, here: Workspace, tmp_path: Path) -> None:
    damage(elsewhere)
    with pytest.raises(UserError) as caught:
        import_runs(elsewhere, here)
    assert "\n" not in str(caught.value)
    assert not [path for path in here.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not (tmp_path / "outside.csv").exists()
