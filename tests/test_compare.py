"""Comparison: only paired runs get a difference, sentences match the numbers, and a damaged run does not stop the others."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Outcome
from pcam_kaggle.scoring.bootstrap import bootstrap_difference, concordant_pairs
from pcam_kaggle.scoring.delong import delong_difference
from pcam_kaggle.scoring.render import describe_difference, differing_keys
from scipy import stats

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.files import csv_bytes, read_json, sha256, write_csv, write_json
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import score
from pcam_kaggle.scoring.compare import compare, find_baseline, read_entry
from pcam_kaggle.scoring.metrics import Difference, auc, holm

N, FOLDS = 900, 3
RNG = np.random.default_rng(0)
LABELS, FOLD = RNG.integers(0, 2, N), np.arange(N) % FOLDS
SHARED = RNG.normal(size=N)


def write_run(run: Path, signal: float, seed: int, folds: str = "same", **config: float) -> pd.DataFrame:
    """Write a finished run whose scores hold `signal` of the label; return its OOF table."""
    noise = np.random.default_rng(seed).normal(size=N)
    probability = 1 / (1 + np.exp(-(signal * LABELS + SHARED + 0.5 * noise)))
    oof = pd.DataFrame({"id": [f"p{n:04d}" for n in range(N)], "label": LABELS, "fold": FOLD, "probability": probability})
    write_csv(run / "oof.csv", oof)
    write_json(run / "config.json", {"config": {"n_splits": FOLDS, **config}, "folds": "stratified", "folds_sha256": folds})
    for fold in range(FOLDS):
        write_json(run / f"fold_{fold}" / "predictions.json", {})
        write_json(run / f"fold_{fold}" / "metrics.json", {"seconds": 60.0, "parameters": 10, "images_per_second": 5.0})
    metrics = {"folds_sha256": folds, "missing_folds": [], "oof_sha256": sha256(csv_bytes(oof)), **score(oof)}
    write_json(run / "metrics.json", metrics)
    return oof


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder of runs: two similar, one worse, one on other folds, and unfinished, damaged and incomplete ones."""
    runs = tmp_path / "runs"
    write_run(runs / "best", 2.0, 1, lr=0.1)
    write_run(runs / "twin", 1.99, 2, lr=0.2)
    write_run(runs / "worse", 1.0, 3, lr=0.1)
    write_run(runs / "elsewhere", 2.0, 4, folds="other", lr=0.1)
    write_run(runs / "unfinished", 2.0, 5, lr=0.1)
    (runs / "unfinished" / "fold_1" / "predictions.json").unlink()
    write_run(runs / "damaged", 2.0, 6, lr=0.1)
    (runs / "damaged" / "oof.csv").write_text("id,label\n")
    write_run(runs / "partial", 2.0, 7, lr=0.1)
    partial = runs / "partial" / "metrics.json"
    write_json(partial, read_json(partial) | {"missing_folds": [2]})
    write_run(runs / "garbled", 2.0, 6, lr=0.1)
    (runs / "garbled" / "config.json").write_text("{")
    return runs


def compared(runs: Path, baseline: str | None = None) -> tuple[dict, object]:
    """Return the entries by name and the baseline."""
    entries = [read_entry(Run(path)) for path in sorted(runs.iterdir())]
    base = find_baseline(entries, baseline)
    compare(entries, base, None)
    return {entry.name: entry for entry in entries}, base


def test_too_many_slides_make_a_difference_undefined(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_kaggle.scoring.bootstrap.MAX_CLUSTERS", 20)
    base = read_entry(Run(runs / "best"))
    ids = base.oof["id"]
    known = pd.DataFrame({"id": ids, "wsi": [f"slide_{number % 20}" for number in range(N)]})
    compare([base, read_entry(Run(runs / "twin"))], base, known)
    twin = read_entry(Run(runs / "twin"))
    compare([base, twin], base, known[100:])
    assert twin.pooled is not None
    assert "more than the 20 that can be drawn" in twin.pooled.undefined
    assert twin.corrected_p is None


def test_differences_are_the_paired_ones(runs: Path) -> None:
    entries, base = compared(runs, "worse")
    assert base is entries["worse"]
    best, worse = entries["best"].oof["probability"].to_numpy(), entries["worse"].oof["probability"].to_numpy()
    assert entries["best"].pooled == delong_difference(LABELS, best, worse)
    inside = FOLD == 2
    assert entries["best"].folds[2].value == pytest.approx(
        auc(LABELS[inside], best[inside]) - auc(LABELS[inside], worse[inside])
    )


def test_sentences_match_the_numbers(runs: Path) -> None:
    entries, base = compared(runs, "best")
    sentence = describe_difference(entries["worse"], base)
    value, low, high = (float(text) for text in re.findall(r"\d\.\d{4}", sentence)[:3])
    assert sentence.startswith("best is better than worse by ")
    assert low <= value <= high
    assert value == pytest.approx(-entries["worse"].pooled.value, abs=1e-4)
    assert low > 0
    same = describe_difference(entries["twin"], base)
    assert "no significant difference" in same
    assert "more patches are needed" in same
    assert describe_difference(entries["worse"], base) == describe_difference(entries["worse"], base)


def test_an_unpaired_run_has_its_reason(runs: Path) -> None:
    entries, base = compared(runs, "best")
    assert entries["elsewhere"].pooled is None
    assert "folds or labels differ" in describe_difference(entries["elsewhere"], base)


def test_a_broken_run_is_listed_with_its_reason(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--work", str(runs.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, reason in (
        ("unfinished", "folds 1"),
        ("damaged", "oof.csv"),
        ("partial", "without some"),
        ("garbled", "not JSON"),
        ("elsewhere", "folds or labels differ"),
    ):
        assert any(line.split()[0] == name and reason in line for line in lines if line.strip()), name
    assert sum(line.split()[0] in ("best", "twin", "worse") for line in lines[:9] if line.strip()) == 3


@pytest.mark.parametrize("cost", [{"parameters": 1e400}, {"seconds": "an hour"}, {"images_per_second": None}, {}])
def test_invalid_costs_affect_only_their_run(cost: dict, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "twin" / "fold_0" / "metrics.json"
    costs = read_json(file) | cost if cost else {}
    file.write_text(json.dumps(costs))
    assert main(["compare", "--work", str(runs.parent)]) == 0
    assert "twin" in (printed := capsys.readouterr().out)
    assert any(line.split()[:1] == ["twin"] and "damaged" in line for line in printed.splitlines())


def test_only_differing_config_fields_are_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--work", str(runs.parent), "--format", "csv"]) == 0
    header = capsys.readouterr().out.splitlines()[0].split(",")
    assert "lr" in header
    assert "n_splits" not in header
    assert differing_keys([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]) == ["b"]


def test_every_format_holds_the_same_numbers(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = {}
    for form in ("csv", "json", "md"):
        assert main(["compare", "--work", str(runs.parent), "--format", form]) == 0
        read[form] = capsys.readouterr().out
    records = json.loads(read["json"])["runs"]
    pooled = [record["pooled"] for record in records if record["pooled"]]
    assert pooled == sorted(pooled, reverse=True)
    assert all(f"{value:.4f}" in read["md"] for value in pooled)
    assert [line.split(",")[0] for line in read["csv"].splitlines()[1:]] == [record["run"] for record in records]


def test_a_chosen_baseline_that_is_broken_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("unfinished", "unheard"):
        assert main(["compare", "--work", str(runs.parent), "--baseline", name]) == 2
        err = capsys.readouterr().err
        assert name in err
        assert err.count("\n") == 1


def test_holm_matches_a_worked_example() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


def test_the_slide_bootstrap_is_wider_than_delong_where_slides_differ() -> None:
    rng = np.random.default_rng(3)
    slides = np.repeat(np.arange(60), 30)
    labels = (rng.random(1800) < rng.beta(1, 1.5, 60)[slides]).astype(int)
    first, second = (labels + rng.normal(size=1800) + rng.normal(size=60)[slides] for _ in range(2))

    def by(groups: np.ndarray, level: float = 0.95) -> Difference:
        return bootstrap_difference(
            labels, groups, *(concordant_pairs(labels, groups, scores) for scores in (first, second)), level
        )

    plain, by_slide = delong_difference(labels, first, second), by(slides)
    assert by_slide.value == pytest.approx(plain.value, abs=1e-12)
    assert by_slide.error > 1.5 * plain.error
    assert by(np.arange(1800)).error == pytest.approx(plain.error, rel=0.1)
    assert by(slides) == by_slide
    for level in (0.5, 0.95):
        made = by(slides, level)
        assert made.high - made.value == pytest.approx(stats.t(59).ppf((1 + level) / 2) * made.error)
    assert by_slide.p == pytest.approx(2 * stats.t(59).sf(abs(by_slide.value) / by_slide.error))
    # Drawn slide by slide, the slow way.
    draws = np.random.default_rng(1).integers(0, 60, (400, 60))
    patches = [np.concatenate([np.arange(30) + 30 * slide for slide in draw]) for draw in draws]
    slow = [auc(labels[some], first[some]) - auc(labels[some], second[some]) for some in patches]
    assert by_slide.error == pytest.approx(np.std(slow, ddof=1), rel=0.15)


def test_the_bootstrap_draws_whole_slides() -> None:
    rng = np.random.default_rng(4)
    slides, labels = np.arange(40) // 4, rng.integers(0, 2, 40)
    scores = rng.integers(0, 6, 40).astype(float)
    copied = np.concatenate([np.flatnonzero(slides == slide) for slide in (1, 1, 3, 7)])
    expected = auc(labels[copied], scores[copied])
    pairs = concordant_pairs(labels, slides, scores)
    counts = np.bincount([1, 1, 3, 7], minlength=10).astype(float)
    positives, negatives = (counts @ np.bincount(slides[labels == k], minlength=10) for k in (1, 0))
    assert counts @ pairs @ counts / (positives * negatives) == pytest.approx(expected, abs=1e-12)


def test_real_runs_of_the_pipeline_compare(
    pcam: Callable[..., Outcome], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pcam("pipeline", "--set", "seed=1", "--name", "other").status == 0
    capsys.readouterr()
    assert main(["compare", "--work", str(tmp_path / "work")]) == 0
    out = capsys.readouterr().out
    assert "seed" in out.splitlines()[0]
    assert "other" in out
