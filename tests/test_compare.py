"""Comparison: only paired runs get a difference, sentences match the numbers, and a damaged run does not stop the others."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import FOLD, LABELS, SHARED, N, predictions, write_blended_run, write_run

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.files import file_sha256, read_json, write_json
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.pipeline.compare import compare_runs, print_result, read_run
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import RunPredictions
from pcam_kaggle.scoring.intervals import delong_difference
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.scoring.tables import describe_difference, differing_keys, p_text


def made(name: str, signal: float, seed: int) -> RunPredictions:
    """Return a run whose logits hold `signal` of the label and, in part, noise that all runs share."""
    return predictions(name, signal * LABELS + SHARED + 0.5 * np.random.default_rng(seed).normal(size=N))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return the folder of four runs: two similar ones, a worse one, and one on other folds."""
    write_blended_run(tmp_path, made("best", 2.0, 1), lr=0.1)
    write_blended_run(tmp_path, made("twin", 1.99, 2), lr=0.2)
    write_blended_run(tmp_path, made("worse", 1.0, 3), lr=0.1)
    write_blended_run(tmp_path, replace(made("elsewhere", 2.0, 4), folds_sha256="other"), lr=0.1)
    return tmp_path / "runs"


def compared(runs: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what `compare` prints."""
    capsys.readouterr()
    status = main(["compare", "--work", str(runs.parent), *arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_differences_and_sentences_are_the_paired_ones(runs: Path) -> None:
    comparison = compare_runs(Workspace(runs.parent, runs / "store"), [], "worse", None)
    by_name = {run.name: run for run in comparison.runs}
    best, worse = by_name["best"].oof["probability"].to_numpy(), by_name["worse"].oof["probability"].to_numpy()
    pooled = delong_difference(LABELS, best, worse)
    assert comparison.baseline is by_name["worse"]
    assert by_name["best"].pooled == pooled.model_copy(update={"corrected_p": by_name["best"].pooled.corrected_p})
    assert pooled.p < by_name["best"].pooled.corrected_p <= 2 * pooled.p
    inside = FOLD == 2
    difference = auc(LABELS[inside], best[inside]) - auc(LABELS[inside], worse[inside])
    assert by_name["best"].folds[2].value == pytest.approx(difference)
    assert by_name["elsewhere"].pooled is None
    assert "folds or labels differ from those of worse" in describe_difference(by_name["elsewhere"], comparison.baseline)


def test_sentences_name_the_better_run(runs: Path) -> None:
    comparison = compare_runs(Workspace(runs.parent, runs / "store"), [], None, None)
    by_name = {run.name: run for run in comparison.runs}
    assert comparison.baseline is by_name["best"]
    worse, twin = by_name["worse"].pooled, by_name["twin"].pooled
    assert worse.high < 0
    numbers = f"by {-worse.value:.4f} [{-worse.high:.4f}, {-worse.low:.4f}], {p_text(worse.corrected_p)} (unit: patch)."
    assert describe_difference(by_name["worse"], comparison.baseline) == f"best is better than worse {numbers}"
    numbers = f"({twin.text('+.4f')}, {p_text(twin.corrected_p)}; unit: patch)."
    expected = f"twin compared with best: no significant difference {numbers}"
    assert describe_difference(by_name["twin"], comparison.baseline) == expected


def edited(name: str, **values: object) -> Callable[[Run], None]:
    """Return the damage of other `values` in the JSON file `name` of a run, where 1e400 is infinity and None is null."""

    def damage(run: Run) -> None:
        (run.folder / name).write_text(json.dumps(read_json(run.folder / name) | values))

    return damage


def replaced(row: int, column: int, value: str) -> Callable[[Run], None]:
    """Return the damage of another value in all lines from `row` on of oof.csv, which metrics.json then describes."""

    def damage(run: Run) -> None:
        lines = [line.split(",") for line in (run.folder / "oof.csv").read_text().splitlines()]
        for line in lines[row:]:
            line[column] = value
        (run.folder / "oof.csv").write_text("".join(",".join(line) + "\n" for line in lines))
        edited("metrics.json", oof_sha256=file_sha256(run.folder / "oof.csv"))(run)

    return damage


DAMAGES: dict[str, tuple[Callable[[Run], object], str]] = {
    "unfinished": (lambda run: (run.fold(1).folder / "predictions.json").unlink(), "unfinished: folds 1 lack predictions"),
    "unblended": (lambda run: (run.folder / "metrics.json").unlink(), "not blended"),
    "partial": (edited("metrics.json", missing_folds=[2]), "blended without some of its folds"),
    "truncated": (lambda run: (run.folder / "oof.csv").write_text("id,label\n"), "oof.csv: not what metrics.json describes"),
    "garbled": (lambda run: run.config_file.write_text("{"), "config.json: Invalid JSON"),
    "infinite": (edited("fold_0/metrics.json", parameters=1e400), "fold_0/metrics.json: parameters:"),
    "worded": (edited("fold_0/metrics.json", seconds="an hour"), "fold_0/metrics.json: seconds:"),
    "null": (edited("fold_0/metrics.json", images_per_second=None), "fold_0/metrics.json: images_per_second:"),
    "empty": (lambda run: write_json(run.fold(0).folder / "metrics.json", {}), "fold_0/metrics.json: fold:"),
    "not-finite": (replaced(718, 3, "inf"), "oof.csv: 3 rows hold a number that is not finite, of id p0717"),
    "no-number": (replaced(718, 3, ""), "oof.csv: 3 rows hold a number that is not finite, of id p0717"),
    "label-2": (replaced(718, 1, "2"), "oof.csv: 3 labels are not 0 or 1, of id p0717"),
}


def test_a_damaged_run_is_listed_with_its_reason(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, (damage, _)) in enumerate(DAMAGES.items()):
        damage(write_blended_run(runs.parent, made(name, 2.0, seed)))
    notes = {row["run"]: row["note"] for row in json.loads(compared(runs, capsys, "--format", "json"))["runs"]}
    assert list(notes)[3:4] == ["worse"]
    assert sorted(list(notes)[4:]) == sorted(DAMAGES)
    for name, (_, reason) in DAMAGES.items():
        assert reason in notes[name], name
    assert notes["elsewhere"] == "not paired: folds or labels differ from those of best"
    assert re.search(r"^ *unfinished .*folds 1 lack", compared(runs, capsys), re.MULTILINE)


def test_every_format_holds_the_same_numbers(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, markdown, content = (compared(runs, capsys, "--format", form) for form in ("csv", "md", "json"))
    records = json.loads(content)["runs"]
    pooled = [record["pooled"] for record in records]
    assert pooled == sorted(pooled, reverse=True)
    assert all(f"{value:.4f}" in markdown for value in pooled)
    assert [line.split(",")[0] for line in table.splitlines()[1:]] == [record["run"] for record in records]
    # Of the config, only fields that differ.
    assert "lr" in table.splitlines()[0].split(",")
    assert "n_splits" not in table.splitlines()[0].split(",")
    assert differing_keys([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]) == ["b"]


def test_a_baseline_that_cannot_be_scored_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs.parent, made("unblended", 1.0, 5))
    for arguments, message in (
        (["--baseline", "unblended"], "--baseline unblended: not blended"),
        (["--baseline", "unheard"], "not unheard"),
        (["unblended"], "none of 1 runs can be scored: unblended: not blended"),
    ):
        assert main(["compare", "--work", str(runs.parent), *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_a_result_is_compared_with_other_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(runs.parent, runs / "store")
    print_result(workspace, ["none", "twin"])
    printed = capsys.readouterr().out
    assert printed.startswith("twin:\n  fold 0       240 patches   OOF AUC ")
    assert "best compared with twin" in printed
    edited("metrics.json", missing_folds=[2])(Run(runs / "twin"))
    print_result(workspace, ["twin"])
    assert "compared" not in capsys.readouterr().out
    print_result(workspace, ["none"])
    assert capsys.readouterr().out == "none: no fold is finished\n"


def test_a_blend_of_an_earlier_version_takes_its_scheme_from_its_members(runs: Path) -> None:
    members, blended = [Run(runs / name) for name in ("best", "twin")], Run(runs / "ab")
    blended.folder.mkdir()
    for name in ("oof.csv", "metrics.json"):
        (blended.folder / name).write_bytes((members[0].folder / name).read_bytes())
    edited("metrics.json", members={"best": 0.5, "twin": 0.5}, scheme="")(blended)
    assert (read_run(blended).scheme, read_run(blended).problem) == ("stratified_3_42", "")
    # Members that were trained again on other folds, or are gone, do not determine the scheme of the blend.
    before = members[0].config_file.read_bytes()
    for damage in (
        lambda: [edited("config.json", folds_sha256="other")(member) for member in members],
        lambda: [edited("config.json", folds="slides_3_42")(members[1])],
        members[1].config_file.unlink,
    ):
        damage()
        assert "does not name its fold scheme" in read_run(blended).problem
        for member in members:
            member.config_file.write_bytes(before)
    edited("metrics.json", scheme="stratified_3_42")(blended)
    assert read_run(blended).problem == ""
