"""Intervals and tests resample the groups of the folds, name their unit in every output, and never fall back to patches."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import file_sha256, read_json, write_csv, write_json
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.runs.submissions import describe, write_ledger
from pcam_kaggle.runs.submissions import write_submission
from pcam_kaggle.pipeline.job import Job
from pcam_kaggle.pipeline.stages import run_blend
from pcam_kaggle.report.page import write_report
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import Member, blend
from pcam_kaggle.scoring.bootstrap import bootstrap_difference, bootstrap_interval, concordant_pairs
from pcam_kaggle.scoring.compare import compare_runs, read_entry
from pcam_kaggle.scoring.delong import delong_difference, delong_interval
from pcam_kaggle.scoring.resampling import cluster_codes, resampling, unit_of

SLIDES, PATCHES, FOLDS = 18, 40, 3
N = SLIDES * PATCHES
SLIDE = np.repeat(np.arange(SLIDES), PATCHES)
FOLD = SLIDE % FOLDS
RNG = np.random.default_rng(0)
LABELS = (RNG.random(N) < RNG.uniform(0.2, 0.8, SLIDES)[SLIDE]).astype(int)
IDS = np.array([f"p{n:04d}" for n in range(N)])
GROUPS = np.array([f"s{slide:02d}" for slide in SLIDE])
SHARED = RNG.normal(size=N)


def scores(signal: float, seed: int) -> np.ndarray:
    """Return probabilities with a `signal` of the label and a random shift on every slide."""
    rng = np.random.default_rng(seed)
    return 1 / (1 + np.exp(-(signal * LABELS + SHARED + 0.3 * rng.normal(size=N) + rng.normal(size=SLIDES)[SLIDE])))


def write_fold_file(work: Path, scheme: str) -> str:
    """Write the fold file of `scheme`, with its groups if any; return its hash."""
    table = pd.DataFrame({"id": IDS, "label": LABELS, "fold": FOLD})
    file = work / "folds" / f"{scheme}.csv"
    write_csv(file, table if scheme.startswith("stratified") else table.assign(group=GROUPS))
    return file_sha256(file)


def write_run(work: Path, name: str, probability: np.ndarray, scheme: str = "slides_3_42") -> None:
    """Write a trained and predicted run."""
    run, digest = work / "runs" / name, write_fold_file(work, scheme)
    write_json(run / "config.json", {"config": {"n_splits": FOLDS}, "folds": scheme, "folds_sha256": digest})
    for fold in range(FOLDS):
        folder, inside = run / f"fold_{fold}", fold == FOLD
        oof = pd.DataFrame({"id": IDS[inside], "label": LABELS[inside], "probability": probability[inside]})
        write_csv(folder / "oof.csv", oof)
        write_csv(folder / "test.csv", pd.DataFrame({"id": ["t0", "t1"], "probability": [0.1, 0.9]}))
        files = {file: file_sha256(folder / file) for file in ("oof.csv", "test.csv")}
        write_json(folder / "predictions.json", {"sources": {}, "files": files})
        write_json(folder / "metrics.json", {"seconds": 60.0, "parameters": 10, "images_per_second": 5.0})


def blended(work: Path, *members: str, method: str = "mean", slides: Path | None = None) -> dict:
    """Run the blend stage on `members`; return the metrics that it wrote."""
    job = Job(
        data=Data(work / "data"),
        workspace=Workspace(work, work / "store"),
        demo=False,
        experiment="bottleneck",
        config=Config(n_splits=FOLDS),
        name="-".join(members),
        members=members,
        method=method,
        slides=slides,
    )
    run_blend(job)
    return job.run.blend_metrics()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a workspace with two runs on folds by slide, blended separately and together."""
    write_run(tmp_path, "a", scores(1.0, 1))
    write_run(tmp_path, "b", scores(1.5, 2))
    for members in (["a"], ["b"], ["a", "b"]):
        blended(tmp_path, *members)
    return tmp_path


def compared(work: Path, capsys: pytest.CaptureFixture[str], *arguments: str, form: str = "json") -> str:
    """Return what `compare` prints."""
    capsys.readouterr()
    status = main(["compare", *arguments, "--work", str(work), "--format", form])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


@pytest.mark.parametrize(
    ("scheme", "unit"), [("slides_5_42", "slide"), ("stain_5_42", "stain group"), ("stratified_5_42", "patch")]
)
def test_the_scheme_determines_the_unit(scheme: str, unit: str) -> None:
    assert unit_of(scheme) == unit
    oof = pd.DataFrame({"id": IDS})
    if unit != "patch":
        with pytest.raises(ValueError, match=f"one {unit} are not independent"):
            cluster_codes(oof["id"], None, scheme)
    else:
        assert cluster_codes(oof["id"], None, scheme) is None
    with pytest.raises(UserError, match="not a fold scheme"):
        unit_of("")


def test_a_blend_as_baseline_resamples_slides(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default = json.loads(compared(work, capsys, "a", "a-b"))
    chosen = json.loads(compared(work, capsys, "a", "a-b", "--baseline", "a"))
    assert default["runs"][0]["run"] == "a-b"
    assert default["runs"][0]["note"] == "the baseline"
    assert default["unit"] == chosen["unit"] == "slide"
    (p,) = (row["p"] for row in default["runs"] if row["difference"] is not None)
    assert [p] == [row["p"] for row in chosen["runs"] if row["difference"] is not None]
    codes = cluster_codes(pd.Series(IDS), pd.DataFrame({"id": IDS, "wsi": GROUPS}), "slides_3_42")
    pairs = [
        concordant_pairs(LABELS, codes, read_entry(Run(work / "runs" / name)).oof["probability"].to_numpy())
        for name in ("a", "a-b")
    ]
    assert p == pytest.approx(bootstrap_difference(LABELS, codes, *pairs).p, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [[], ["--baseline", "a"], ["--baseline", "a-b"]])
@pytest.mark.parametrize(("scheme", "unit"), [("slides", "slide"), ("stratified", "patch"), ("stain", "stain group")])
def test_every_format_names_the_unit(
    scheme: str, unit: str, baseline: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, signal in (("a", 1.0), ("b", 1.5)):
        write_run(tmp_path, name, scores(signal, int(10 * signal)), f"{scheme}_3_42")
        blended(tmp_path, name)
    metrics = blended(tmp_path, "a", "b")
    assert metrics["scheme"] == f"{scheme}_3_42"
    assert metrics["pooled"]["unit"] == metrics["ranked"]["unit"] == unit
    assert f"(unit: {unit})" in capsys.readouterr().out
    read = json.loads(compared(tmp_path, capsys, *baseline))
    assert read["unit"] == unit
    assert {row["unit"] for row in read["runs"]} == {row["interval_unit"] for row in read["runs"]} == {unit}
    assert all(f"unit: {unit}" in sentence for sentence in read["words"])
    table = pd.read_csv(io.StringIO(compared(tmp_path, capsys, *baseline, form="csv")))
    assert set(table["unit"]) == set(table["interval_unit"]) == {unit}
    for form in ("text", "md"):
        assert f"95 % intervals and p (unit: {unit}) are from" in compared(tmp_path, capsys, *baseline, form=form)
    workspace = Workspace(tmp_path, tmp_path / "store")
    write_report(compare_runs(workspace, [], None, None), workspace, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"95 % intervals and p (unit: {unit}) are from" in page
    assert (f"AUC of a by {unit}" in page) == (unit != "patch")


def test_intervals_and_folds_resample_slides(work: Path) -> None:
    comparison = compare_runs(Workspace(work, work / "store"), [], "a", None)
    entry = next(each for each in comparison.entries if each.name == "b")
    ours, theirs = (each.oof["probability"].to_numpy() for each in (entry, comparison.baseline))
    assert entry.metrics["pooled"] == bootstrap_interval(LABELS, SLIDE, ours)._asdict()
    patches = delong_interval(LABELS, ours)
    assert entry.metrics["pooled"]["high"] - entry.metrics["pooled"]["low"] > 1.5 * (patches.high - patches.low)
    assert [fold.unit for fold in entry.folds] == ["slide"] * FOLDS
    assert [fold.units for fold in entry.folds] == [SLIDES // FOLDS] * FOLDS
    inside = FOLD == 1
    patch = delong_difference(LABELS[inside], ours[inside], theirs[inside])
    assert entry.folds[1].value == pytest.approx(patch.value, abs=1e-12)
    assert entry.folds[1].error > 1.5 * patch.error


def test_the_needed_sample_size_is_in_slides(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = next(
        each for each in json.loads(compared(work, capsys, "a", "b"))["words"] if "no significant difference" in each
    )
    more = re.search(r"about ([\d,]+) more slides are needed", sentence)
    assert more, sentence
    assert "patches" not in sentence
    comparison = compare_runs(Workspace(work, work / "store"), ["a"], "b", None)
    made = next(entry.pooled for entry in comparison.entries if entry.pooled)
    # Rounded to one digit.
    expected = SLIDES * ((1.96 + 0.84) * made.error / made.value) ** 2 - SLIDES
    assert int(more.group(1).replace(",", "")) == pytest.approx(expected, rel=0.5)


def test_a_missing_fold_file_is_an_error_unless_a_slide_map_is_given(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = work / "folds" / "slides_3_42.csv"
    before = json.loads(compared(work, capsys))
    other = pd.read_csv(file).assign(fold=lambda table: (table["fold"] + 1) % FOLDS)
    for reason in ("not the folds of these runs", "missing"):
        if reason == "missing":
            file.unlink()
        else:
            write_csv(file, other)
        for arguments in ([], ["--baseline", "a"], ["a"]):
            assert main(["compare", *arguments, "--work", str(work)]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert f"{file}: {reason}" in err
            assert "--slides" in err
        with pytest.raises(UserError, match=f"slides_3_42.csv: {reason}"):
            blended(work, "a", "b", method="climb")
    slides = work / "map.csv"
    write_csv(slides, pd.DataFrame({"id": IDS, "wsi": GROUPS}))
    assert json.loads(compared(work, capsys, "--slides", str(slides))) == before
    assert blended(work, "a", "b", method="climb", slides=slides)["gain_of_weights"]["unit"] == "slide"
    write_csv(slides, pd.DataFrame({"id": ["other"], "wsi": ["s00"]}))
    assert main(["compare", "--work", str(work), "--slides", str(slides)]) == 2
    assert "has none of the 720 patches" in capsys.readouterr().err


def test_a_map_overrides_ungrouped_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_run(tmp_path, name, scores(1, seed), "stratified_3_42")
        blended(tmp_path, name)
    slides = tmp_path / "map.csv"
    write_csv(slides, pd.DataFrame({"id": IDS[5:], "wsi": GROUPS[5:]}))
    assert json.loads(compared(tmp_path, capsys))["unit"] == "patch"
    assert json.loads(compared(tmp_path, capsys, "--slides", str(slides)))["unit"] == "slide"
    assert "Each of 5 patches that the slide map lacks counts as a slide" in compared(
        tmp_path, capsys, "--slides", str(slides), form="text"
    )


def test_a_blend_of_an_older_version_takes_its_scheme_from_its_members(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = work / "runs" / "a-b" / "metrics.json"
    metrics = read_json(file)
    write_json(file, {key: value for key, value in metrics.items() if key != "scheme"})
    assert json.loads(compared(work, capsys))["unit"] == "slide"
    configs = [work / "runs" / name / "config.json" for name in ("a", "b")]
    kept = [read_json(config) for config in configs]
    # Members that were trained again on other folds do not determine the scheme of the blend.
    for config, made in zip(configs, kept, strict=True):
        write_json(config, made | {"folds_sha256": "other"})
    assert "blend again" in read_entry(Run(file.parent)).problem
    for config, made in zip(configs, kept, strict=True):
        write_json(config, made)
    for spoil in (lambda: write_json(config, read_json(config) | {"folds": "stratified_3_42"}), config.unlink):
        spoil()
        assert "blend again" in read_entry(Run(file.parent)).problem
    write_json(file, metrics)
    assert read_entry(Run(file.parent)).problem == ""


def climbers(scheme: str) -> list[Member]:
    """Return members whose weights gain on a third of the slides: significant over patches but not over slides."""
    rng = np.random.default_rng(5)
    few = SLIDE < 6
    good = np.where(few, 3.0 * LABELS, 0.0) + rng.normal(size=N)
    bad = rng.normal(size=(2, N))
    tests = [pd.DataFrame({"id": ["t0", "t1"], "probability": [0.1, 0.9]})] * FOLDS
    base = pd.DataFrame({"id": IDS, "label": LABELS, "fold": FOLD})
    return [
        Member(f"m{number}", base.assign(probability=1 / (1 + np.exp(-values))), tests, "same", [], scheme)
        for number, values in enumerate([good, *bad])
    ]


def test_climb_tests_its_gain_over_slides_on_folds_by_slide(tmp_path: Path) -> None:
    by_patch, _ = blend(climbers("stratified_3_42"), "climb", Run(tmp_path / "patch"))
    slides = pd.DataFrame({"id": IDS, "wsi": GROUPS})
    by_slide, _ = blend(climbers("slides_3_42"), "climb", Run(tmp_path / "slide"), slides, "slide")
    assert by_patch["gain_of_weights"]["value"] == pytest.approx(by_slide["gain_of_weights"]["value"], abs=1e-12)
    assert (by_patch["method"], by_patch["gain_of_weights"]["unit"]) == ("climb", "patch")
    assert by_patch["gain_of_weights"]["low"] > 0 > by_slide["gain_of_weights"]["low"]
    assert (by_slide["method"], by_slide["gain_of_weights"]["unit"]) == ("mean", "slide")
    with pytest.raises(ValueError, match="not independent"):
        blend(climbers("slides_3_42"), "climb", Run(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_the_blend_stage_prints_the_unit_of_the_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for made in climbers("slides_3_42"):
        write_run(tmp_path, made.name, made.oof["probability"].to_numpy())
    metrics = blended(tmp_path, "m0", "m1", "m2", method="climb")
    assert (metrics["method"], metrics["gain_of_weights"]["unit"]) == ("mean", "slide")
    line = next(line for line in capsys.readouterr().out.splitlines() if "weights minus mean" in line)
    assert line.endswith("(unit: slide): within the noise, so the mean is used")


def write_single_positive_runs(work: Path) -> None:
    """Write two blended runs with a single positive patch."""
    labels = np.where(np.arange(6) == 2, 1, 0)
    tests = [pd.DataFrame({"id": ["t0", "t1"], "probability": [0.1, 0.9]})]
    for name, seed in (("a", 1), ("b", 2)):
        values = np.random.default_rng(seed).random(6)
        oof = pd.DataFrame({"id": list("abcdef"), "label": labels, "fold": 0, "probability": values})
        blend([Member(name, oof, tests, "same", [], "stratified_3_42")], "mean", Run(work / "runs" / name))


def test_an_undefined_interval_is_null_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_single_positive_runs(tmp_path)
    reason = "a single positive patch"
    pooled = read_json(tmp_path / "runs" / "a" / "metrics.json")["pooled"]
    assert (pooled["low"], pooled["high"], pooled["undefined"]) == (None, None, reason)
    read = json.loads(compared(tmp_path, capsys), parse_constant=pytest.fail)
    row = next(row for row in read["runs"] if row["difference"] is not None)
    keys = ("pooled_low", "difference_low", "difference_high", "p", "difference_0_high", "p_0")
    assert [row[key] for key in keys] == [None] * len(keys)
    assert row["undefined_pooled"] == row["undefined_difference"] == row["undefined_difference_0"] == reason
    assert f"interval and p n/a ({reason}; unit: patch)" in read["words"][0]
    table = pd.read_csv(io.StringIO(compared(tmp_path, capsys, form="csv")))
    assert table["p"].isna().all()
    for form in ("text", "md"):
        printed = compared(tmp_path, capsys, form=form)
        assert f"n/a ({reason})" in printed
        assert "nan" not in printed
    workspace = Workspace(tmp_path, tmp_path / "store")
    write_report(compare_runs(workspace, [], None, None), workspace, tmp_path / "page.html")
    assert f"n/a ({reason})" in (tmp_path / "page.html").read_text()


def test_a_submission_with_an_undefined_interval_has_its_reason(tmp_path: Path) -> None:
    write_single_positive_runs(tmp_path)
    sample = tmp_path / "sample.csv"
    write_csv(sample, pd.DataFrame({"id": ["t0", "t1"], "label": [0, 0]}))
    submissions = tmp_path / "submissions"
    write_submission(Run(tmp_path / "runs" / "a"), sample, submissions / "a.csv")
    _, description = describe(submissions, "a")
    assert "[n/a (a single positive patch)] (unit: patch)" in description
    ledger = write_ledger(submissions)
    assert ledger[["oof_low", "oof_high"]].isna().all(axis=None)
    assert ledger["oof_unit"].tolist() == ["patch"]
    assert pd.read_csv(submissions / "ledger.csv")["oof_auc"].notna().all()


def test_climb_falls_back_to_the_mean_if_its_gain_is_undefined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = pd.DataFrame({"id": IDS, "wsi": np.where(LABELS == 1, "s00", GROUPS)})
    metrics, _ = blend(climbers("slides_3_42"), "climb", Run(tmp_path / "ab"), one, "slide")
    assert metrics["method"] == "mean"
    assert metrics["gain_of_weights"]["low"] is None
    for made in climbers("slides_3_42"):
        write_run(tmp_path, made.name, made.oof["probability"].to_numpy())
    write_csv(tmp_path / "map.csv", one)
    blended(tmp_path, "m0", "m1", "m2", method="climb", slides=tmp_path / "map.csv")
    line = next(line for line in capsys.readouterr().out.splitlines() if "weights minus mean" in line)
    assert line.endswith(
        "[n/a (a single slide with positive patches)] (unit: slide): not known to be more than noise, so the mean is used"
    )


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [("probability", np.nan, "not finite"), ("probability", np.inf, "not finite"), ("label", 2, "not 0 or 1")],
)
def test_invalid_scores_and_labels_are_reported_with_their_file(column: str, value: float, reason: str, work: Path) -> None:
    run = work / "runs" / "a"
    oof = pd.read_csv(run / "oof.csv")
    write_csv(run / "oof.csv", oof.assign(**{column: oof[column].where(oof.index > 6, value)}))
    metrics = read_json(run / "metrics.json")
    write_json(run / "metrics.json", metrics | {"oof_sha256": file_sha256(run / "oof.csv")})
    problem = read_entry(Run(run)).problem
    assert f"{run / 'oof.csv'}: 7 " in problem
    assert reason in problem
    assert "p0004 and 2 more" in problem


def test_folds_that_do_not_match_the_runs_are_an_error(work: Path) -> None:
    oof = pd.DataFrame({"id": IDS, "fold": FOLD})
    table, unit = resampling("slides_3_42", oof, work / "folds", None)
    assert unit == "slide"
    assert table["wsi"].tolist() == GROUPS.tolist()
    write_fold_file(work, "stratified_3_42")
    (work / "folds" / "stratified_3_42.csv").rename(work / "folds" / "slides_3_42.csv")
    with pytest.raises(UserError, match="not the folds of these runs"):
        resampling("slides_3_42", oof, work / "folds", None)


def test_members_on_other_schemes_are_not_blended(tmp_path: Path) -> None:
    first, second, _ = climbers("slides_3_42")
    with pytest.raises(UserError, match="trained on other folds"):
        blend([first, replace(second, scheme="stain_3_42")], "mean", Run(tmp_path / "ab"))
