"""Import of a run: the newer state of a fold wins, and only valid files of a run are copied."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from pcam_kaggle.cli.main import main
from pcam_kaggle.core import files
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import EXPERIMENTS, Experiment
from pcam_kaggle.core.files import PART, locked, read_json, write_json
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.pipeline.compare import compare_runs
from pcam_kaggle.runs import checkpoint, import_run
from pcam_kaggle.runs.fold import FOLD_FILES
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.records import Environment
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import record_score

RUN = Path("runs") / "bottleneck"


@pytest.fixture
def here(tmp_path: Path) -> Workspace:
    """Return an empty workspace."""
    return Workspace(tmp_path / "here", tmp_path / "here" / "store")


def change(file: Path, **values: object) -> None:
    """Set `values` in a JSON file."""
    write_json(file, read_json(file) | values)


def contents(folder: Path, names: Iterable[Path]) -> dict[Path, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def files_of(folder: Path) -> dict[Path, bytes]:
    """Return the files of the run in `folder`, relative to it."""
    files = (path.relative_to(folder) for path in (folder / RUN).rglob("*.*"))
    return contents(folder, files)


def without_last_epochs(session: Path, early: Path) -> Path:
    """Copy `session` to `early` as it was when all folds but the first lacked their last epoch; return `early`."""
    shutil.copytree(session, early)
    for fold in (early / RUN / "fold_1", early / RUN / "fold_2"):
        content = checkpoint.load(fold / "last.pt")
        for name in set(FOLD_FILES) - {"log.csv", "teacher.json"}:
            (fold / name).unlink()
        checkpoint.save(fold / "last.pt", content | {"log": json.dumps(json.loads(content["log"])[:-1])})
    return early


def test_of_two_states_of_a_fold_the_newer_one_is_used(session: Path, here: Workspace, tmp_path: Path) -> None:
    early = without_last_epochs(session, tmp_path / "early")
    shutil.rmtree(early / RUN / "fold_2")
    change(early / RUN / "metrics.json", method="of two folds")
    assert import_runs(early, here) == ["bottleneck"]
    assert not (here.root / RUN / "fold_1" / "oof.csv").exists()
    import_runs(session, here)
    complete = files_of(session)
    for source in (session, early):
        import_runs(source, here)
        assert contents(here.root, complete) == complete


def test_a_blend_comes_with_its_members_and_the_one_of_more_folds_is_used(
    data: Data, tiny: Config, tmp_path: Path, here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "one", Experiment("", tiny))
    monkeypatch.setitem(EXPERIMENTS, "both", Experiment("", tiny, members=("one",)))
    session, early = tmp_path / "elsewhere", tmp_path / "early"
    line = ["-e", "both", "--data", str(data.root), "--work", str(session)]
    for stage in ("pipeline", "blend"):
        assert main([stage, *line, "--folds", "0,1"]) == 0
    assert import_runs(session, here) == ["both", "one"]
    shutil.copytree(session, early)
    assert main(["pipeline", *line]) == 0
    assert import_runs(session, here) == ["both", "one"]
    names = [*map(Path, ("runs/both/oof.csv", "runs/both/metrics.json", "submissions/both.csv", "submissions/both.json"))]
    complete = contents(session, names)
    for source in (session, early):
        assert contents(here.root, names) == complete
        assert import_runs(source, here) == []


@pytest.mark.parametrize(("is_update", "at"), [*product([False], range(1, 28, 3)), *product([True], range(0, 17, 2))])
def test_an_interrupted_import_is_completed_here_and_by_others(
    is_update: bool, at: int, session: Path, here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying stops after `at` files, perhaps while it replaces folds of fewer epochs: the import can be completed."""
    if is_update:
        import_runs(without_last_epochs(session, tmp_path / "early"), here)
    copy, copied = import_run._copy, []

    def end(source: Path, target: Path) -> None:
        if len(copied) == at:
            raise KeyboardInterrupt
        copied.append(target)
        copy(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(import_run, "_copy", end)
        import_runs(session, here)
    # No fold is incomplete: each has all files, or those of the earlier state.
    states = [set(FOLD_FILES) - {"teacher.json"}, *([{"last.pt", "log.csv"}] if is_update else [])]
    assert all({path.name for path in fold.iterdir()} in states for fold in (here.root / RUN).glob("fold_*"))
    third = Workspace(tmp_path / "third", tmp_path / "third" / "store")
    import_runs(here.root, third)
    complete = files_of(session) | contents(session, [Path("folds/stratified_3_42.csv"), Path("submissions/bottleneck.csv")])
    for completed in (third, here):
        import_runs(session, completed)
        assert contents(completed.root, complete) == complete


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_fold_is_not_lost_between_two_renames(is_replaced: bool, session: Path, here: Workspace) -> None:
    import_runs(session, here)
    complete, fold = files_of(session), here.root / RUN / "fold_1"
    (fold / "notes.txt").write_text("mine")
    fold.replace(fold.with_name(f".fold_1.old{PART}"))
    if is_replaced:
        shutil.copytree(session / RUN / "fold_1", fold)
        (fold / "notes.txt").write_text("mine")
        (fold / "best.pt").unlink()
    import_runs(session, here)
    assert (fold / "notes.txt").read_text() == "mine"
    assert contents(here.root, complete) == complete
    assert not list(here.root.rglob(f"*{PART}"))


@pytest.mark.parametrize(("aucs", "taken"), [((0.8, 0.9), True), ((0.9, 0.8), False)])
def test_a_session_that_ended_before_its_best_checkpoint(
    aucs: tuple[float, float], taken: bool, session: Path, here: Workspace
) -> None:
    """The last checkpoint replaces the best one only if the last epoch is the best."""
    fold = session / RUN / "fold_1"
    for name in set(FOLD_FILES) - {"last.pt", "log.csv", "teacher.json"}:
        (fold / name).unlink()
    content = checkpoint.load(fold / "last.pt")
    rows = [row | {"valid_auc": auc} for row, auc in zip(json.loads(content["log"]), aucs, strict=True)]
    checkpoint.save(fold / "last.pt", content | {"log": json.dumps(rows)})
    import_runs(session, here)
    assert (here.root / RUN / "fold_1" / "last.pt").exists() == taken


def test_the_sessions_of_both_places_are_kept(session: Path, here: Workspace, tmp_path: Path) -> None:
    early = shutil.copytree(session, tmp_path / "early")
    shutil.rmtree(early / RUN / "fold_2")
    ours, theirs = Run(session / RUN).environments(), {"backend": {"kind": "cuda", "precision": "fp16"}, "started": "before"}
    write_json(early / RUN / "environment.json", [theirs])
    for source in (early, session, session):
        import_runs(source, here)
        shutil.rmtree(here.root / RUN / "fold_1")
    assert Run(here.root / RUN).environments() == [Environment.model_validate(theirs), *ours]


def test_kaggles_scores_are_kept(session: Path, here: Workspace) -> None:
    import_runs(session, here)
    record_score(here.submissions / "bottleneck.csv", public_score=0.9)
    shutil.rmtree(here.root / RUN / "fold_1")
    assert import_runs(session, here) == ["bottleneck"]
    assert read_json(here.submissions / "bottleneck.json")["public_score"] == 0.9


def test_a_hash_of_weights_that_one_place_lacks_is_no_other_config(session: Path, here: Workspace) -> None:
    import_runs(session, here)
    shutil.rmtree(here.root / RUN / "fold_1")
    change(here.root / RUN / "config.json", weights_sha256="0" * 64)
    assert import_runs(session, here) == ["bottleneck"]
    change(session / RUN / "config.json", weights_sha256="1" * 64)
    with pytest.raises(UserError, match="another config"):
        import_runs(session, here)


@pytest.mark.parametrize("name", ["folds/stratified_3_42.csv", "submissions/bottleneck.csv"])
def test_nothing_is_imported_beside_another_file_or_a_writer(
    name: str, session: Path, here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with locked(here.root / RUN), pytest.raises(UserError, match="another process is writing there"):
        import_runs(session, here)
    (here.root / name).parent.mkdir(parents=True)
    (here.root / name).write_text("id,label,fold\n")
    with pytest.raises(UserError, match=r"differs from"):
        import_runs(session, here)
    assert not (here.root / RUN).exists()


def other_values(file: Path) -> None:
    file.write_text(file.read_text().replace("0.", ".0"))


PICKLE = b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: change(run / "config.json", config={"unheard_of": 1}), "config.json: .*unheard_of"),
        (lambda run: change(run / "config.json", config={"n_splits": 10**9}), "config.json: .*n_splits"),
        (lambda run: other_values(run / "../../submissions/bottleneck.csv"), "bottleneck.csv: has changed since"),
        (lambda run: other_values(run / "fold_0/oof.csv"), "oof.csv: not what predictions.json describes"),
        (lambda run: (run / "fold_0/metrics.json").write_text("{}"), "metrics.json: fold: Field required"),
        (lambda run: (run / "fold_0/best.pt").write_bytes(PICKLE), "best.pt: not a complete checkpoint"),
        (lambda run: (run / "fold_0/log.csv").write_text("epoch"), "log.csv: not a training log"),
        (lambda run: (run / "../../folds/stratified_3_42.csv").write_text("id\n"), "42.csv: has changed since the run"),
    ],
)
def test_a_damaged_run_is_not_imported(damage: Callable[[Path], object], message: str, session: Path, here: Workspace) -> None:
    damage(session / RUN)
    with pytest.raises(UserError, match=message) as caught:
        import_runs(session, here)
    assert "\n" not in str(caught.value)
    assert not [path for path in here.root.rglob("*") if path.is_file() and path.suffix != ".lock"]


def import_theirs(work: Path, data: Data, change: Callable = lambda oof, test: (oof, test), *options: str) -> int:
    rng, oof, test = np.random.default_rng(1), Run(work / RUN).oof(), pd.read_csv(data.sample)[["id"]]
    tables = (table.assign(probability=rng.random(len(table))) for table in (oof.drop(columns="label"), test))
    for name, table in zip(("oof", "test"), change(*tables), strict=True):
        table.sample(frac=1).to_csv(work / f"{name}.csv", index=False)
    line = ["import", "theirs", *(options or ("--data", str(data.root))), "--work", str(work)]
    return main([*line, "--oof", str(work / "oof.csv"), "--test", str(work / "test.csv")])


def test_imported_predictions_are_compared_blended_and_submitted(
    data: Data, pcam: Callable, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, runs = finished_run, finished_run / "runs"
    assert import_theirs(work, data) == 0
    for names in (["theirs"], ["bottleneck", "theirs"]):
        assert pcam("blend", *names).status == pcam("submission", "--name", "-".join(names)).status == 0
    own, other = (Run(runs / name).oof() for name in ("bottleneck", "theirs"))
    pooled = roc_auc_score(own["label"], (own["probability"] + other["probability"]) / 2)
    assert Run(runs / "bottleneck-theirs").blend_metrics().pooled.value == pytest.approx(pooled)
    test, sent = (pd.read_csv(work / name, index_col="id") for name in ("test.csv", "submissions/theirs.csv"))
    np.testing.assert_allclose(sent["label"], test.loc[sent.index, "probability"])
    assert main(["report", "theirs", "bottleneck", "--baseline", "theirs", "--work", str(work)]) == 0
    has_no_models = f"{runs / 'theirs'}: was imported as predictions and has no models"
    assert (work / "reports" / "theirs+bottleneck.html").read_text().count(has_no_models) == 2
    line = ["evaluate", "bottleneck-theirs", "--work", str(work), "--patches", str(work), "--out", str(work / "out.csv")]
    assert main(line) == 2
    assert has_no_models in capsys.readouterr().err
    assert len({r.scheme + r.problem + r.unpaired_reason for r in compare_runs(Workspace(work, work), []).runs}) == 1
    assert import_theirs(work, data) == 2
    shutil.rmtree(runs / "theirs")
    assert import_theirs(work, data, lambda oof, test: (oof.assign(fold=(oof["fold"] + 1) % 3), test)) == 0
    assert '"config": {\n    "n_splits": 3\n  },\n  "folds": "given_' in Run(runs / "theirs").config_file.read_text()


def test_unusable_predictions_are_not_imported(data: Data, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = min(pd.read_csv(data.labels)["id"])
    for change, message in (
        (lambda oof, test: (pd.concat([oof, oof[:1]]), test), f"oof.csv: ids in more than one row: 1 ({first})"),
        (lambda oof, test: (oof.replace(first, "x"), test), f"oof.csv: 2 ids lack a label or a row here ({first}, x)"),
        (lambda oof, test: (oof.replace({"fold": {1: 3}}), test), "oof.csv: fold 1 of 0 to 2 is missing or lacks a label"),
        (lambda oof, test: (oof.assign(group="s"), test), "oof.csv: group s is in several folds"),
        (lambda oof, test: (oof.assign(probability=1.5), test), "oof.csv: 36 probabilities are outside of [0, 1]"),
        (lambda oof, test: (oof, test[1:]), "test.csv: its ids are not those of"),
    ):
        assert import_theirs(finished_run, data, change) == 2
        assert message in capsys.readouterr().err
        assert not [*finished_run.glob("runs/theirs"), *finished_run.glob("folds/given*")]


@pytest.mark.parametrize("demo", ["", "demo"])
def test_the_printed_command_blends(demo: str, data: Data, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data.root, finished_run / "demo" / "data")
    assert import_theirs(finished_run, data, lambda oof, test: (oof, test), *(["--demo"] if demo else [])) == 0
    _, _, command = capsys.readouterr().out.splitlines()[-1].partition("next: python -m pcam_kaggle ")
    assert main(shlex.split(command)) == 0
    assert Run(finished_run / demo / "runs" / "theirs").has_score
