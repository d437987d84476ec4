"""Intervals and tests resample the groups of the folds, name their unit in every output, and never fall back to patches."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_runs import FOLD, FOLDS, IDS, LABELS, PATCHES, SLIDE, SLIDE_MAP, SLIDES, by_slide, fold_table, write_blended_run

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import write_csv
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.pipeline.compare import compare_runs, resampled_groups
from pcam_kaggle.report.page import write_report
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import describe, write_ledger, write_submission
from pcam_kaggle.scoring.blend import RunPredictions, blend
from pcam_kaggle.scoring.compare import Comparison
from pcam_kaggle.scoring.intervals import Clusters, bootstrap_interval, delong_difference, delong_interval, paired_test, unit_of
from pcam_kaggle.scoring.results import BlendMetrics

RUNS = ("a", "b")


def comparison(work: Path, names: list[str], baseline: str | None = None) -> Comparison:
    return compare_runs(Workspace(work, work / "store"), names, baseline, None)


def write_runs(work: Path, scheme: str) -> None:
    """Write two blended runs on the folds of `scheme`."""
    for seed, name in enumerate(RUNS, 1):
        write_blended_run(work, by_slide(name, 0.5 + 0.5 * seed, seed, scheme))


def blended(work: Path, *options: str) -> BlendMetrics:
    """Blend both runs on the command line; return the metrics that were written."""
    assert main(["blend", *RUNS, "--work", str(work), *options]) == 0
    return Run(work / "runs" / "-".join(RUNS)).blend_metrics()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a workspace with two runs on folds by slide."""
    write_runs(tmp_path, "slides_3_42")
    return tmp_path


def compared(work: Path, capsys: pytest.CaptureFixture[str], *arguments: str, form: str = "json") -> str:
    """Return what `compare` prints."""
    capsys.readouterr()
    status = main(["compare", *arguments, "--work", str(work), "--format", form])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


@pytest.mark.parametrize(("scheme", "unit"), [("slides_5", "slide"), ("stain_5", "stain group"), ("stratified_5", "patch")])
def test_the_scheme_determines_the_unit(scheme: str, unit: str) -> None:
    assert unit_of(scheme) == unit
    if unit == "patch":
        assert Clusters.of(pd.Series(IDS), None, unit).codes is None
    else:
        with pytest.raises(ValueError, match=f"one {unit} are not independent"):
            Clusters.of(pd.Series(IDS), None, unit)
    with pytest.raises(UserError, match="not a fold scheme"):
        unit_of("")


@pytest.mark.parametrize(
    ("scheme", "unit"),
    [
        ("slides", "slide"),
        pytest.param("stratified", "patch", marks=pytest.mark.slow),
        pytest.param("stain", "stain group", marks=pytest.mark.slow),
    ],
)
def test_every_output_names_the_unit(scheme: str, unit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, f"{scheme}_3_42")
    metrics = blended(tmp_path)
    assert metrics.scheme == f"{scheme}_3_42"
    assert metrics.pooled.unit == metrics.ranked.unit == unit
    assert f"(unit: {unit})" in capsys.readouterr().out
    # A blend as baseline, which is the default as it is best, and an experiment's run.
    for arguments in ([], ["--baseline", "a"]):
        read = json.loads(compared(tmp_path, capsys, *arguments))
        assert read["unit"] == unit
        assert {row["unit"] for row in read["runs"]} == {row["interval_unit"] for row in read["runs"]} == {unit}
        assert all(f"unit: {unit}" in sentence for sentence in read["words"])
        table = pd.read_csv(io.StringIO(compared(tmp_path, capsys, *arguments, form="csv")))
        assert set(table["unit"]) == set(table["interval_unit"]) == {unit}
        for form in ("text", "md"):
            assert f"95 % intervals and p (unit: {unit}) are from" in compared(tmp_path, capsys, *arguments, form=form)
    assert json.loads(compared(tmp_path, capsys))["runs"][0]["note"] == "the baseline"
    write_report(comparison(tmp_path, []), Workspace(tmp_path, tmp_path / "store"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"95 % intervals and p (unit: {unit}) are from" in page
    assert (f"AUC of a by {unit}" in page) == (unit != "patch")


def test_intervals_and_folds_resample_slides(work: Path) -> None:
    made = comparison(work, [], "a")
    run = next(each for each in made.runs if each.name == "b")
    ours, theirs = (each.oof["probability"].to_numpy() for each in (run, made.baseline))
    assert run.metrics.pooled == bootstrap_interval(LABELS, SLIDE, ours)
    patches = delong_interval(LABELS, ours)
    assert run.metrics.pooled.high - run.metrics.pooled.low > 1.5 * (patches.high - patches.low)
    pooled = paired_test(LABELS, theirs, Clusters("slide", SLIDE))(ours)
    assert run.pooled == pooled.model_copy(update={"corrected_p": pooled.p})
    assert [(fold.unit, fold.units) for fold in run.folds] == [("slide", SLIDES // FOLDS)] * FOLDS
    inside = FOLD == 1
    patch = delong_difference(LABELS[inside], ours[inside], theirs[inside])
    assert run.folds[1].value == pytest.approx(patch.value, abs=1e-12)
    assert run.folds[1].error > 1.5 * patch.error


def test_a_missing_fold_file_is_an_error_unless_a_slide_map_is_given(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = work / "folds" / "slides_3_42.csv"
    before = json.loads(compared(work, capsys))
    others = fold_table("slides_3_42").assign(fold=(FOLD + 1) % FOLDS), fold_table("stratified_3_42"), None
    for other, reason in zip(others, (*["not the folds of these runs"] * 2, "missing"), strict=True):
        file.unlink()
        if other is not None:
            write_csv(file, other)
        for arguments in (["compare"], ["compare", "--baseline", "a"], ["compare", "a"], ["blend", *RUNS]):
            assert main([*arguments, "--work", str(work)]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert f"{file}: {reason}" in err
            assert "--slides" in err
    slides = work / "map.csv"
    write_csv(slides, SLIDE_MAP)
    assert json.loads(compared(work, capsys, "--slides", str(slides))) == before
    assert blended(work, "--method", "climb", "--slides", str(slides)).gain_of_weights.unit == "slide"
    write_csv(slides, pd.DataFrame({"id": ["other"], "wsi": ["s00"]}))
    assert main(["compare", "--work", str(work), "--slides", str(slides)]) == 2
    assert "has none of the 720 patches" in capsys.readouterr().err


def test_the_groups_of_the_fold_file_are_resampled(work: Path) -> None:
    table, unit = resampled_groups("slides_3_42", pd.DataFrame({"id": IDS, "fold": FOLD}), work / "folds", None)
    assert unit == "slide"
    assert table["wsi"].tolist() == SLIDE_MAP["wsi"].tolist()
    # A patch that the groups lack is a cluster of its own.
    codes = Clusters.of(pd.Series(IDS), table[5:], unit).codes
    assert len(np.unique(codes)) == SLIDES + 5
    assert len(np.unique(codes[5:PATCHES])) == 1


def test_a_map_replaces_ungrouped_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, "stratified_3_42")
    slides = tmp_path / "map.csv"
    write_csv(slides, SLIDE_MAP[5:])
    assert json.loads(compared(tmp_path, capsys))["unit"] == "patch"
    assert json.loads(compared(tmp_path, capsys, "--slides", str(slides)))["unit"] == "slide"
    printed = compared(tmp_path, capsys, "--slides", str(slides), form="text")
    assert "Each of 5 patches that the slide map lacks counts as a slide" in printed


REASON = "a single positive patch"


@pytest.fixture
def undefined(tmp_path: Path) -> Path:
    """Return a workspace with two blended runs that have a single positive patch."""
    labels = np.where(np.arange(6) == 2, 1, 0)
    tests = [pd.DataFrame({"id": ["t0", "t1"], "probability": [0.1, 0.9]})]
    for seed, name in enumerate(RUNS):
        values = np.random.default_rng(seed).random(6)
        oof = pd.DataFrame({"id": list("abcdef"), "label": labels, "fold": 0, "probability": values})
        made = RunPredictions(name, oof, tests, "stratified_3_42", "same", [])
        Run(tmp_path / "runs" / name).write_blend(blend([made], "mean"))
    return tmp_path


def test_an_undefined_interval_is_null_with_its_reason(undefined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pooled = Run(undefined / "runs" / "a").blend_metrics().pooled
    assert (pooled.low, pooled.high, pooled.undefined) == (None, None, REASON)
    read = json.loads(compared(undefined, capsys), parse_constant=pytest.fail)
    row = next(row for row in read["runs"] if row["difference"] is not None)
    keys = ("pooled_low", "difference_low", "difference_high", "p", "difference_0_high", "p_0")
    assert [row[key] for key in keys] == [None] * len(keys)
    assert row["undefined_pooled"] == row["undefined_difference"] == row["undefined_difference_0"] == REASON
    assert f"interval and p n/a ({REASON}; unit: patch)" in read["words"][0]
    assert pd.read_csv(io.StringIO(compared(undefined, capsys, form="csv")))["p"].isna().all()
    for form in ("text", "md"):
        printed = compared(undefined, capsys, form=form)
        assert f"n/a ({REASON})" in printed
        assert "nan" not in printed
    write_report(comparison(undefined, []), Workspace(undefined, undefined / "store"), undefined / "page.html")
    assert f"n/a ({REASON})" in (undefined / "page.html").read_text()


def test_a_submission_with_an_undefined_interval_has_its_reason(undefined: Path) -> None:
    sample, submissions = undefined / "sample.csv", undefined / "submissions"
    write_csv(sample, pd.DataFrame({"id": ["t0", "t1"], "label": [0, 0]}))
    write_submission(Run(undefined / "runs" / "a"), sample, submissions / "a.csv")
    _, description = describe(submissions, "a")
    assert f"[n/a ({REASON})] (unit: patch)" in description
    ledger = write_ledger(submissions)
    assert ledger[["oof_low", "oof_high"]].isna().all(axis=None)
    assert ledger["oof_unit"].tolist() == ["patch"]
    assert pd.read_csv(submissions / "ledger.csv")["oof_auc"].notna().all()
