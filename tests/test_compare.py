"""Comparison: runs are paired, the groups of their folds are resampled, and a damaged run does not stop the others."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_runs import (
    FOLD,
    FOLDS,
    LABELS,
    SLIDE,
    SLIDE_MAP,
    by_slide,
    fold_table,
    noisy,
    paired_difference,
    write_blended_run,
    write_run,
)
from sklearn.metrics import roc_auc_score

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import file_sha256, read_json, write_csv
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.folds import Scheme, make_folds
from pcam_kaggle.pipeline.compare import compare_runs, print_result
from pcam_kaggle.report.page import write_report
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import describe, write_ledger, write_submission
from pcam_kaggle.scoring.blend import RunPredictions, blend
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.intervals import Clusters, interval, unit_of
from pcam_kaggle.scoring.results import BlendMetrics
from pcam_kaggle.scoring.tables import comparison_table, conclusions, describe_difference

RUNS = ("a", "b")


def write_runs(work: Path, scheme: str) -> None:
    for seed, name in enumerate(RUNS, 1):
        write_blended_run(work, by_slide(name, 0.5 + 0.5 * seed, seed, scheme), lr=seed)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a workspace with two runs on folds by slide."""
    write_runs(tmp_path, "slides_3_42")
    return tmp_path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return the folder of five runs: two similar ones, a worse one, one on other folds, and one on fewer patches."""
    for seed, (name, noise) in enumerate((("best", 0.9), ("worse", 4.0), ("twin", 0.95)), 1):
        write_blended_run(tmp_path, noisy(name, noise, seed))
    write_blended_run(tmp_path, replace(noisy("elsewhere", 1.0, 4), folds_sha256="other"))
    fewer = noisy("fewer", 4.0, 5)
    write_blended_run(tmp_path, replace(fewer, oof=fewer.oof[1:].reset_index(drop=True)))
    return tmp_path / "runs"


def comparison(work: Path, baseline: str | None = None) -> tuple[dict[str, ComparedRun], Comparison]:
    made = compare_runs(Workspace(work, work / "store"), [], baseline)
    return {run.name: run for run in made.runs}, made


def compared(work: Path, capsys: pytest.CaptureFixture[str], *arguments: str, form: str = "json") -> str:
    """Return what `compare` prints."""
    capsys.readouterr()
    status = main(["compare", *arguments, "--work", str(work), "--format", form])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def blended(work: Path, *options: str) -> BlendMetrics:
    assert main(["blend", *RUNS, "--work", str(work), *options]) == 0
    return Run(work / "runs" / "-".join(RUNS)).blend_metrics()


@pytest.mark.parametrize(("scheme", "clusters"), [("stratified_3_42", Clusters()), ("slides_3_42", Clusters("slide", SLIDE))])
def test_differences_are_the_paired_ones(scheme: str, clusters: Clusters, tmp_path: Path) -> None:
    write_runs(tmp_path, scheme)
    by_name, made = comparison(tmp_path, "a")
    assert made.reference is by_name["a"]
    run = by_name["b"]
    ours, theirs = (each.oof["probability"].to_numpy() for each in (run, made.reference))
    assert run.metrics.pooled == interval(LABELS, ours, clusters)
    assert run.pooled == paired_difference(LABELS, ours, theirs, clusters)
    for number, fold in enumerate(run.folds):
        inside = number == FOLD
        assert fold == paired_difference(LABELS[inside], ours[inside], theirs[inside], clusters.part(inside))
        assert fold.units == (6 if scheme.startswith("slides") else 240)
    if scheme.startswith("slides"):
        patches = interval(LABELS, ours)
        assert run.metrics.pooled.high - run.metrics.pooled.low > 1.5 * (patches.high - patches.low)


def test_sentences_name_the_better_run(runs: Path) -> None:
    by_name, made = comparison(runs.parent, "best")
    worse = by_name["worse"].pooled
    for name, start in {
        "worse": f"best is better than worse by {-worse.value:.4f} [{-worse.high:.4f}, {-worse.low:.4f}], p < 0.0001 (",
        "twin": "twin compared with best: no significant difference (",
        "elsewhere": "elsewhere: not paired: folds or labels differ from those of best.",
    }.items():
        assert describe_difference(by_name[name], made.reference).startswith(start)
    assert made.best == []
    by_name, made = comparison(runs.parent, "worse")
    assert describe_difference(by_name["best"], made.reference).startswith("best is better than worse by ")


def test_without_a_baseline_one_sentence_lists_the_runs_that_may_be_the_best(runs: Path) -> None:
    by_name, made = comparison(runs.parent)
    assert (made.reference, made.best) == (by_name["best"], ["best", "twin"])
    sentence, *others = conclusions(made)
    assert sentence.startswith(
        "With 95 % confidence, the best of best, twin, worse is best or twin; worse is significantly worse"
    )
    assert [each.partition(":")[0] for each in others] == ["elsewhere", "fewer"]
    row = comparison_table(made).set_index("run").loc["twin"]
    assert row["p_0"] == by_name["twin"].folds[0].corrected_p > by_name["twin"].folds[0].p
    # Three pairs are tested here, two with a baseline that was named.
    _, named = comparison(runs.parent, "best")
    wide, narrow = (each.runs[0].pooled or each.runs[-1].pooled for each in (made, named))
    assert wide.high - wide.low > narrow.high - narrow.low


def on_folds(made: RunPredictions, *folds: int) -> RunPredictions:
    """Return `made` without the predictions of other `folds`."""
    return replace(made, oof=made.oof[made.oof["fold"].isin(folds)])


@pytest.mark.parametrize(
    ("folds", "arguments", "expected", "unfinished"),
    [
        # Named runs are compared on their common folds, all others on the folds that most have.
        ({"a": [0], "b": [0, 2]}, ["a", "b"], [0], {}),
        ({"a": [0, 1, 2], "b": [0, 2]}, ["a", "b"], [0, 2], {}),
        ({"a": [0], "b": [0, 2], "c": [2, 0]}, [], [0], {}),
        ({"a": [1], "b": [0, 2], "c": [2, 0]}, [], [0, 2], {"a": "0, 2"}),
        ({"a": [0, 1, 2], "b": [0]}, [], [0, 1, 2], {"b": "1, 2"}),
        ({"a": [0], "b": [0], "c": [1]}, [], [0], {"c": "0"}),
        ({"a": [0, 1, 2], "b": [0, 1]}, ["--folds", "0", "--baseline", "b"], [0], {}),
        ({"a": [0, 1, 2], "b": [1]}, ["--folds", "0"], [0], {"b": "0"}),
    ],
)
def test_runs_with_some_folds_are_compared_on_those(
    folds: dict, arguments: list, expected: list, unfinished: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (name, predicted) in enumerate(folds.items()):
        write_run(tmp_path, on_folds(noisy(name, 1.0, seed), *predicted))
    read = json.loads(compared(tmp_path, capsys, *arguments))
    note = "unfinished: folds {} lack predictions (--folds chooses others)"
    notes = {name: note.format(missing) for name, missing in unfinished.items()}
    assert {row["run"]: row["note"] for row in read["runs"] if row["pooled"] is None} == notes
    part = np.isin(FOLD, expected)
    for row in [row for row in read["runs"] if row["pooled"]]:
        made = noisy(row["run"], 1.0, [*folds].index(row["run"])).oof
        assert row["pooled"] == pytest.approx(roc_auc_score(LABELS[part], made["probability"][part]))
        assert [int(key[5:]) for key in row if re.fullmatch(r"fold_\d", key)] == expected
    assert f"Folds: {', '.join(map(str, expected))}." in compared(tmp_path, capsys, *arguments, form="text")
    for key in ["", *(f"_{fold}" for fold in expected)]:
        for row in [row for row in read["runs"] if row.get(f"difference{key}")]:
            low, high = row[f"difference{key}_low"], row[f"difference{key}_high"]
            assert (row[f"p{key}"] < 0.05) == (low * high > 0)


def test_runs_without_a_common_fold_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(RUNS):
        write_run(tmp_path, on_folds(noisy(name, 1.0, seed), seed))
    for command in ("compare", "report", "blend"):
        assert main([command, *RUNS, "--work", str(tmp_path)]) == 2
        assert capsys.readouterr().err == "error: no fold is predicted in all of these runs: a has 0, b has 1\n"
    assert main(["compare", "--folds", "0,7", "--work", str(tmp_path)]) == 2
    assert "a: has folds 0 to 2, b: has folds 0 to 2" in capsys.readouterr().err


def test_numbers_of_other_folds_are_not_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, folds) in enumerate({"a": (0, 1), "b": (0, 1)}.items()):
        write_run(tmp_path, on_folds(noisy(name, 4.0, seed), *folds))
    # Better, and complete, but on folds of its own.
    write_run(tmp_path, replace(noisy("c", 0.1, 3), folds_sha256="other"))
    for arguments in ([], ["a", "b", "c"]):
        read = json.loads(compared(tmp_path, capsys, *arguments))
        assert (read["reference"], {row["run"]: row["fold_1"] is not None for row in read["runs"]}) == (
            "a" if read["runs"][1]["run"] == "a" else "b",
            {"a": True, "b": True, "c": True},
        )
        assert read["words"][0].startswith("With 95 % confidence, the best of ")


def test_a_blend_is_compared_on_chosen_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [noisy(name, 1.0, seed) for seed, name in enumerate(RUNS)]
    for made in members:
        write_blended_run(tmp_path, made)
    blended(tmp_path)
    row = next(row for row in json.loads(compared(tmp_path, capsys, "--folds", "1"))["runs"] if row["run"] == "a-b")
    mean = np.mean([made.oof["probability"] for made in members], axis=0)
    assert row["pooled"] == pytest.approx(roc_auc_score(LABELS[FOLD == 1], mean[FOLD == 1]))


def test_named_runs_are_blended_on_their_common_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, folds) in enumerate({"a": (0, 1, 2), "b": (0, 2)}.items()):
        write_run(tmp_path, on_folds(noisy(name, 1.0, seed), *folds))
    metrics = blended(tmp_path)
    assert (metrics.folds, metrics.missing_folds) == ([0, 2], [1])
    assert "missing: folds 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scheme", "unit"),
    [
        ("slides", "slide"),
        pytest.param("stratified", "patch", marks=pytest.mark.slow),
        pytest.param("stain", "stain group", marks=pytest.mark.slow),
    ],
)
def test_every_format_holds_the_same_numbers_and_names_the_unit(
    scheme: str, unit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path, f"{scheme}_3_42")
    metrics = blended(tmp_path)
    assert (metrics.scheme, metrics.pooled.unit, metrics.ranked.unit) == (f"{scheme}_3_42", unit, unit)
    assert f"(unit: {unit})" in capsys.readouterr().out
    # The reference is the blend, which is best, and then an experiment's run.
    for arguments in ([], ["--baseline", "a"]):
        read = json.loads(compared(tmp_path, capsys, *arguments))
        assert read["unit"] == unit
        assert {row["unit"] for row in read["runs"]} == {row["interval_unit"] for row in read["runs"]} == {unit}
        assert all(f"unit: {unit}" in sentence for sentence in read["words"])
        table = pd.read_csv(io.StringIO(compared(tmp_path, capsys, *arguments, form="csv")))
        pooled = [row["pooled"] for row in read["runs"]]
        assert pooled == sorted(pooled, reverse=True) == pytest.approx(table["pooled"].tolist())
        # Of the config, only fields that differ.
        assert "lr" in table
        assert "n_splits" not in table
        for form in ("text", "md"):
            printed = compared(tmp_path, capsys, *arguments, form=form)
            assert f"95 % intervals (unit: {unit}) are from" in printed
            assert all(f"{value:.4f}" in printed for value in pooled)
    assert json.loads(compared(tmp_path, capsys))["runs"][0]["note"] == "the highest AUC"
    write_report(comparison(tmp_path)[1], Workspace(tmp_path, tmp_path / "store"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"95 % intervals (unit: {unit}) are from" in page
    assert (f"AUC of a by {unit}" in page) == (unit != "patch")


def edit(run: Run, name: str, **values: object) -> None:
    """Write other `values` in the JSON file `name` of a run."""
    (run.folder / name).write_text(json.dumps(read_json(run.folder / name) | values))


def edit_oof(run: Run, column: str, value: object) -> None:
    """Write another value in the last three rows of a blend's oof.csv, which metrics.json then describes."""
    run.config_file.unlink()
    table = run.oof()
    write_csv(run.folder / "oof.csv", table.assign(**{column: table[column].where(table.index < 717, value)}))
    edit(run, "metrics.json", oof_sha256=file_sha256(run.folder / "oof.csv"))


# A run without a config is a blend, whose own predictions are compared.
DAMAGES: dict[str, tuple[Callable[[Run], object], str]] = {
    "unfinished": (lambda run: (run.fold(1).folder / "predictions.json").unlink(), "unfinished: folds 1 lack predictions"),
    "garbled": (lambda run: run.config_file.write_text("{"), "config.json: Invalid JSON"),
    "unblended": (lambda run: (run.config_file.unlink(), (run.folder / "metrics.json").unlink()), "not blended"),
    "partial": (
        lambda run: (run.config_file.unlink(), edit(run, "metrics.json", folds=[0, 1], missing_folds=[2])),
        "folds 2 lack",
    ),
    "old": (lambda run: (run.config_file.unlink(), edit(run, "metrics.json", scheme="")), "blended by an earlier version"),
    "not-finite": (lambda run: edit_oof(run, "probability", np.inf), "oof.csv: holds a number that is not finite"),
    "label-2": (lambda run: edit_oof(run, "label", 2), "a label is neither 0 nor 1"),
}


def test_a_damaged_run_is_listed_with_its_reason(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, (damage, _)) in enumerate(DAMAGES.items()):
        damage(write_blended_run(runs.parent, noisy(name, 1.0, seed)))
    notes = {row["run"]: row["note"] for row in json.loads(compared(runs.parent, capsys))["runs"]}
    assert sorted(list(notes)[5:]) == sorted(DAMAGES)
    for name, (_, reason) in DAMAGES.items():
        assert reason in notes[name], name
    assert notes["elsewhere"] == "not paired: folds or labels differ from those of best"
    assert notes["fewer"] == "not paired: patches differ from those of best"
    assert re.search(r"^ *unfinished .*folds 1 lack", compared(runs.parent, capsys, form="text"), re.MULTILINE)


def test_a_baseline_that_cannot_be_scored_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs.parent, on_folds(noisy("untrained", 1, 5)))
    for arguments, message in (
        (["--baseline", "untrained"], "--baseline untrained: unfinished: no fold is predicted"),
        (["--baseline", "unheard"], "not unheard"),
        (["untrained"], "none of 1 runs can be scored: untrained: unfinished: no fold is predicted"),
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
    edit(Run(runs / "twin"), "metrics.json", missing_folds=[2])
    print_result(workspace, ["twin"])
    assert "compared" not in capsys.readouterr().out
    print_result(workspace, ["none"])
    assert capsys.readouterr().out == "none: no fold is finished\n"


def test_the_scheme_determines_what_is_resampled() -> None:
    ids = SLIDE_MAP["id"]
    for scheme, unit in (("slides_5_42", "slide"), ("grouped_0a1b2c3d", "slide"), ("stain_5_42", "stain group")):
        assert unit_of(scheme) == unit
    assert Clusters.of(ids, None, unit_of("given_0a1b2c3d")).codes is None
    with pytest.raises(UserError, match="not a fold scheme"):
        unit_of("")
    # A patch that the groups lack is a cluster of its own.
    codes = Clusters.of(ids, SLIDE_MAP[5:], "slide").codes
    assert len(np.unique(codes)) == 18 + 5
    assert len(np.unique(codes[5:40])) == 1


def test_a_missing_fold_file_is_an_error_unless_a_slide_map_is_given(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = work / "folds" / "slides_3_42.csv"
    before = json.loads(compared(work, capsys))
    for other in (fold_table("slides_3_42").assign(fold=(FOLD + 1) % FOLDS), fold_table("stratified_3_42"), None):
        file.unlink()
        if other is not None:
            write_csv(file, other)
        for arguments in (["compare", "--baseline", "a"], ["compare", "a"], ["blend", *RUNS]):
            assert main([*arguments, "--work", str(work)]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert f"{file}: missing, or not the folds of these runs" in err
    slides = work / "map.csv"
    write_csv(slides, SLIDE_MAP)
    assert json.loads(compared(work, capsys, "--slides", str(slides))) == before
    assert blended(work, "--slides", str(slides)).pooled.unit == "slide"
    write_csv(slides, pd.DataFrame({"id": ["other"], "wsi": ["s00"]}))
    assert main(["compare", "--work", str(work), "--slides", str(slides)]) == 2
    assert "has none of the 720 patches" in capsys.readouterr().err


def test_given_folds_are_those_of_a_file_that_has_their_groups(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = fold_table("slides_3_42")
    given, grouped = Scheme(FOLDS, "given", None, 0, table.drop(columns="group")), Scheme(FOLDS, "grouped", None, 0, table)
    for scheme, groups in ((given, None), (grouped, SLIDE_MAP)):
        make_folds(table, scheme, groups, work / "folds")
    write_run(work, by_slide("given", 1.0, 3, given.name))
    rows = json.loads(compared(work, capsys, "given", "a", "--baseline", "given"))["runs"]
    assert [(row["unit"], row["interval_unit"]) for row in rows] == [("slide", "slide")] * 2
    assert main(["blend", "given", "a", "--work", str(work)]) == 0
    assert Run(work / "runs" / "given-a").blend_metrics().scheme == grouped.name


def test_another_report_has_another_name(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr("pcam_kaggle.report.page.write_report", lambda *arguments: names.append(arguments[2].name))
    write_run(work, by_slide("a-b", 1.0, 3))
    for arguments in ([], ["--folds", "0,2"], ["a", "b"], ["a-b"]):
        assert main(["report", *arguments, "--work", str(work)]) == 0
    assert names == ["runs.html", "runs-folds-0-2.html", "a+b.html", "a-b.html"]


def test_a_map_replaces_ungrouped_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, "stratified_3_42")
    write_csv(tmp_path / "map.csv", SLIDE_MAP[5:])
    assert json.loads(compared(tmp_path, capsys))["unit"] == "patch"
    printed = compared(tmp_path, capsys, "--slides", str(tmp_path / "map.csv"), form="text")
    assert "(unit: slide) are from" in printed


def test_an_undefined_interval_is_null_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "a single positive patch"
    tests = [pd.DataFrame({"id": ["t0", "t1"], "probability": [0.1, 0.9]})]
    runs = {name: Run(tmp_path / "runs" / name) for name in RUNS}
    for seed, (name, run) in enumerate(runs.items()):
        oof = pd.DataFrame({"id": list("abcdef"), "label": [0, 0, 1, 0, 0, 0], "fold": 0})
        oof["probability"] = np.random.default_rng(seed).random(6)
        run.write_blend(blend([RunPredictions(name, oof, tests, "stratified_3_42", "same", [])], "mean"))
    read = json.loads(compared(tmp_path, capsys), parse_constant=pytest.fail)
    row = next(row for row in read["runs"] if row["difference"] is not None)
    for key in ("pooled_low", "difference_low", "difference_high", "p", "difference_0_high", "p_0"):
        assert row[key] is None
    assert row["undefined_pooled"] == row["undefined_difference"] == row["undefined_difference_0"] == reason
    assert f"differences n/a: {reason}" in read["words"][0]
    assert pd.read_csv(io.StringIO(compared(tmp_path, capsys, form="csv")))["p"].isna().all()
    printed = compared(tmp_path, capsys, form="text")
    assert f"n/a ({reason})" in printed
    assert "nan" not in printed
    write_report(comparison(tmp_path)[1], Workspace(tmp_path, tmp_path / "store"), tmp_path / "page.html")
    assert f"n/a ({reason})" in (tmp_path / "page.html").read_text()
    sample, submissions = tmp_path / "sample.csv", tmp_path / "submissions"
    write_csv(sample, pd.DataFrame({"id": ["t0", "t1"], "label": [0, 0]}))
    write_submission(runs["a"], sample, submissions / "a.csv")
    assert f"[n/a ({reason})] (unit: patch)" in describe(submissions, "a")[1]
    assert write_ledger(submissions)[["oof_low", "oof_high"]].isna().all(axis=None)
