"""Blending joins by id and uses weights only with a significant gain; a submission has the format that Kaggle requires."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import file_sha256, read_json, write_csv, write_json
from pcam_kaggle.runs.submissions import submission, write_submission
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import Member, blend, climb, cross_climb, read_member
from pcam_kaggle.scoring.delong import delong_difference, delong_interval
from pcam_kaggle.scoring.metrics import auc

N, TESTS, FOLDS = 600, 50, 3
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, N)
FOLD = np.arange(N) % FOLDS
IDS = np.array([f"p{n:03d}" for n in range(N)])


def member(name: str, noise: float, seed: int) -> Member:
    """Return predictions whose logits are the label plus Gaussian noise of SD `noise`."""
    rng = np.random.default_rng(seed)
    probability = 1 / (1 + np.exp(-(LABELS - 0.5 + noise * rng.normal(size=N))))
    oof = pd.DataFrame({"id": IDS, "label": LABELS, "fold": FOLD, "probability": probability})
    ids = [f"t{n:02d}" for n in range(TESTS)]
    tests = [pd.DataFrame({"id": ids, "probability": rng.random(TESTS)}) for _ in range(FOLDS)]
    return Member(name, oof, tests, "same", [], "stratified_3_42")


def write_run(run: Path, made: Member, order: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Write the fold tables of a run, with rows reordered by `order`."""
    write_json(run / "config.json", {"config": {"n_splits": FOLDS}, "folds": made.scheme, "folds_sha256": made.folds})
    for fold in range(FOLDS):
        folder = run / f"fold_{fold}"
        inside = made.oof[made.oof["fold"] == fold][["id", "label", "probability"]]
        write_csv(folder / "oof.csv", order(inside))
        write_csv(folder / "test.csv", order(made.tests[fold]))
        files = {name: file_sha256(folder / name) for name in ("oof.csv", "test.csv")}
        write_json(folder / "predictions.json", {"sources": {}, "files": files})


@pytest.mark.parametrize("method", ["mean", "rank", "climb"])
def test_rows_join_by_id(method: str, tmp_path: Path) -> None:
    members = [member("a", 1, 1), member("b", 2, 2)]
    outputs = []
    for number, shuffle in enumerate((lambda table: table, lambda table: table.sample(frac=1, random_state=3))):
        for made in members:
            write_run(tmp_path / str(number) / made.name, made, shuffle)
        read = [read_member(Run(tmp_path / str(number) / made.name)) for made in members]
        blend(read, method, Run(tmp_path / str(number) / "ab"))
        outputs.append(
            [(tmp_path / str(number) / "ab" / name).read_bytes() for name in ("oof.csv", "test.csv", "metrics.json")]
        )
    assert outputs[0] == outputs[1]


def test_the_mean_of_folds_is_the_mean(tmp_path: Path) -> None:
    alone = member("a", 1, 1)
    metrics, new = blend([alone], "mean", Run(tmp_path / "a"))
    test = pd.read_csv(tmp_path / "a" / "test.csv")
    expected = np.mean([table["probability"] for table in alone.tests], axis=0)
    np.testing.assert_allclose(test["probability"], expected, rtol=1e-12)
    assert new
    assert metrics["pooled"]["value"] == auc(LABELS, alone.oof["probability"].to_numpy())
    assert metrics["fold_auc"][1] == auc(LABELS[FOLD == 1], alone.oof["probability"].to_numpy()[FOLD == 1])
    assert blend([alone], "mean", Run(tmp_path / "a")) == (metrics, False)


def test_metrics_describe_the_blend(tmp_path: Path) -> None:
    metrics, _ = blend([member("a", 1, 1), member("b", 2, 2)], "mean", Run(tmp_path / "ab"))
    oof = pd.read_csv(tmp_path / "ab" / "oof.csv")
    assert oof.columns.tolist() == ["id", "label", "fold", "probability"]
    assert pd.read_csv(tmp_path / "ab" / "test.csv").columns.tolist() == ["id", "probability"]
    areas = [auc(LABELS[fold == FOLD], oof["probability"][fold == FOLD].to_numpy()) for fold in range(FOLDS)]
    ranked = metrics.pop("ranked")
    assert ranked["low"] < ranked["value"] < ranked["high"]
    assert metrics == {
        "members": {"a": 0.5, "b": 0.5},
        "method": "mean",
        "asked": "mean",
        "gain_of_weights": None,
        "scheme": "stratified_3_42",
        "folds_sha256": "same",
        "missing_folds": [],
        "folds": [0, 1, 2],
        "patches": [200, 200, 200],
        "fold_auc": pytest.approx(areas),
        "mean": pytest.approx(np.mean(areas)),
        "sd": pytest.approx(np.std(areas, ddof=1)),
        "pooled": delong_interval(LABELS, oof["probability"].to_numpy())._asdict(),
        "oof_sha256": file_sha256(tmp_path / "ab" / "oof.csv"),
        "test_sha256": file_sha256(tmp_path / "ab" / "test.csv"),
    }
    assert read_json(tmp_path / "ab" / "metrics.json") == metrics | {"ranked": ranked}


@pytest.mark.parametrize("name", ["oof.csv", "test.csv", "metrics.json"])
@pytest.mark.parametrize("loss", ["gone", "other"])
def test_an_incomplete_blend_is_repeated(name: str, loss: str, tmp_path: Path) -> None:
    file = tmp_path / "a" / name
    blend([member("a", 1, 1)], "mean", Run(tmp_path / "a"))
    before = file.read_bytes()
    file.write_text("{}")
    if loss == "gone":
        file.unlink()
    assert blend([member("a", 1, 1)], "mean", Run(tmp_path / "a"))[1]
    assert file.read_bytes() == before


def test_missing_folds_are_listed_when_some_are_chosen(tmp_path: Path) -> None:
    whole = member("a", 1, 1)
    write_run(tmp_path / "a", whole, lambda table: table.iloc[::-1])
    assert read_member(Run(tmp_path / "a")).missing == []
    some = read_member(Run(tmp_path / "a"), [2, 0])
    assert (some.name, some.folds, some.missing, len(some.tests)) == ("a", "same", [1], 2)
    pd.testing.assert_frame_equal(some.oof, whole.oof[whole.oof["fold"] != 1].reset_index(drop=True), check_dtype=False)
    pd.testing.assert_frame_equal(some.tests[1], whole.tests[0])
    one = blend([read_member(Run(tmp_path / "a"), [1])], "mean", Run(tmp_path / "one" / "a"))[0]
    assert (one["sd"], one["missing_folds"], one["folds"]) == (None, [0, 2], [1])
    with pytest.raises(UserError, match="there is one; use mean"):
        blend([read_member(Run(tmp_path / "a"), [1])], "climb", Run(tmp_path / "one" / "a"))


def test_rank_blending_ignores_the_scale_of_a_fold(tmp_path: Path) -> None:
    alone = member("a", 1, 1)
    scale = np.array([1.0, 0.1, 0.01])
    tests = [table.assign(probability=table["probability"] * scale[fold]) for fold, table in enumerate(alone.tests)]
    bent = replace(alone, oof=alone.oof.assign(probability=alone.oof["probability"] * scale[FOLD]), tests=tests)
    first, second = (
        blend([made], "rank", Run(tmp_path / name / "a"))[0] for name, made in (("first", alone), ("second", bent))
    )
    assert first["oof_sha256"] == second["oof_sha256"]
    assert first["test_sha256"] == second["test_sha256"]
    plain = blend([bent], "mean", Run(tmp_path / "third" / "a"))[0]
    assert plain["pooled"]["value"] < plain["ranked"]["value"] == pytest.approx(first["pooled"]["value"])


def test_climb_weights_the_good_member(tmp_path: Path) -> None:
    members = [member("good", 0.4, 1), *(member(f"bad{n}", 8, n) for n in (2, 3, 4))]
    metrics, _ = blend(members, "climb", Run(tmp_path / "ab"))
    assert metrics["method"] == "climb"
    assert metrics["members"]["good"] > 0.9
    assert metrics["gain_of_weights"]["low"] > 0


def test_climb_falls_back_to_the_mean_without_a_significant_gain(tmp_path: Path) -> None:
    members = [member(f"m{n}", 1, n) for n in range(4)]
    metrics, _ = blend(members, "climb", Run(tmp_path / "ab"))
    assert metrics["method"] == "mean"
    assert set(metrics["members"].values()) == {0.25}
    oof = pd.read_csv(tmp_path / "ab" / "oof.csv")
    np.testing.assert_allclose(oof["probability"], np.mean([made.oof["probability"] for made in members], axis=0))


def test_weights_of_a_fold_do_not_depend_on_its_labels() -> None:
    values = np.stack([member(f"m{n}", 1 + n, n).oof["probability"] for n in range(4)])
    inside = FOLD == 1
    # Equal to the labels in one fold and random elsewhere: weights that leak labels of that fold would select it.
    leaky = np.where(inside, LABELS, np.random.default_rng(9).random(N))
    values = np.vstack([values, leaky])
    blended, _ = cross_climb(LABELS, FOLD, values)
    others, _ = cross_climb(np.where(inside, 1 - LABELS, LABELS), FOLD, values)
    np.testing.assert_array_equal(blended[inside], others[inside])
    assert climb(LABELS, values).sum() == pytest.approx(1)


def test_climb_starts_with_the_best_and_adds_what_helps() -> None:
    labels = np.array([0, 0, 1, 1])
    best, helps, hurts = np.array([1, 3, 2, 4.0]), np.array([2, 0, 1.5, 1]), np.array([4, 3, 2, 1.0])
    assert climb(labels, np.stack([hurts, best, helps])).tolist() == [0, 0.5, 0.5]
    assert climb(labels, np.stack([hurts, np.array([1, 2, 3, 4.0])])).tolist() == [0, 1]


def test_climb_selects_with_replacement() -> None:
    values = np.stack([member(f"m{n}", 1 + n / 2, n).oof["probability"] for n in range(3)])
    weights = climb(LABELS, values)
    assert len({*weights.tolist(), 0.0}) > 2
    alone = [auc(LABELS, column) for column in values]
    assert auc(LABELS, weights @ values) > max(alone)


def test_weights_of_a_fold_come_from_all_other_folds() -> None:
    values = np.stack([member(f"m{n}", 1 + n / 2, n).oof["probability"] for n in range(3)])
    blended, gain = cross_climb(LABELS, FOLD, values)
    for fold in range(FOLDS):
        inside = fold == FOLD
        np.testing.assert_array_equal(blended[inside], climb(LABELS[~inside], values[:, ~inside]) @ values[:, inside])
    assert gain == delong_difference(LABELS, blended, values.mean(axis=0))


def test_members_must_share_folds_and_test_ids(tmp_path: Path) -> None:
    first, second = member("a", 1, 1), member("b", 1, 2)
    with pytest.raises(UserError, match="other folds"):
        blend([first, replace(second, folds="other")], "mean", Run(tmp_path / "ab"))
    with pytest.raises(UserError, match="other folds"):
        blend([first, replace(second, scheme="stratified_3_43")], "mean", Run(tmp_path / "ab"))
    fewer = [table.iloc[1:].reset_index(drop=True) for table in second.tests]
    with pytest.raises(UserError, match="test ids"):
        blend([first, replace(second, tests=fewer)], "mean", Run(tmp_path / "ab"))
    with pytest.raises(UserError, match="a, a: a run is named twice"):
        blend([first, first], "mean", Run(tmp_path / "ab"))
    for column, value in (("label", 1 - LABELS), ("fold", 2 - FOLD), ("id", IDS[::-1])):
        with pytest.raises(UserError, match="b and a: trained on other folds or patches"):
            blend([first, replace(second, oof=second.oof.assign(**{column: value}))], "mean", Run(tmp_path / "ab"))
    assert not (tmp_path / "ab").exists()


def test_a_blend_does_not_overwrite_an_experiment(tmp_path: Path) -> None:
    write_json(tmp_path / "plain" / "config.json", {})
    with pytest.raises(UserError, match="--name"):
        blend([member("a", 1, 1), member("b", 1, 2)], "mean", Run(tmp_path / "plain"))


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", member("a", 1, 1), lambda table: table)
    file = tmp_path / "a" / "fold_1" / "test.csv"
    file.write_text(file.read_text()[:-10])
    with pytest.raises(UserError, match=r"fold_1/test.csv: missing or changed"):
        read_member(Run(tmp_path / "a"))
    file.unlink()
    with pytest.raises(UserError, match=r"fold_1/test.csv: missing or changed"):
        read_member(Run(tmp_path / "a"))
    (tmp_path / "a" / "fold_0" / "predictions.json").unlink()
    with pytest.raises(UserError, match=r"fold_0: no predictions; run `python -m pcam_kaggle train` and `predict` for fold 0"):
        read_member(Run(tmp_path / "a"))
    with pytest.raises(UserError, match="b: no such run"):
        read_member(Run(tmp_path / "b"))


def test_predictions_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", member("a", 1, 1), lambda table: table)
    folder = tmp_path / "a" / "fold_1"
    (folder / "best.pt").write_bytes(b"weights")
    made = read_json(folder / "predictions.json")
    write_json(folder / "predictions.json", made | {"sources": {"best_sha256": file_sha256(folder / "best.pt")}})
    read_member(Run(tmp_path / "a"))
    (folder / "best.pt").write_bytes(b"others")
    with pytest.raises(UserError, match="fold_1: trained again since it was predicted"):
        read_member(Run(tmp_path / "a"))


def test_a_patch_is_out_of_fold_once(tmp_path: Path) -> None:
    made = member("a", 1, 1)
    twice = made.oof.assign(id=np.where(IDS == "p004", "p003", IDS))
    write_run(tmp_path / "a", replace(made, oof=twice), lambda table: table)
    with pytest.raises(UserError, match="id p003 is out of fold twice"):
        read_member(Run(tmp_path / "a"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a blended run."""
    blend([member("a", 1, 1)], "mean", Run(tmp_path / "runs" / "a"))
    return tmp_path / "runs" / "a"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Return a sample submission with shuffled ids."""
    ids = np.random.default_rng(5).permutation([f"t{n:02d}" for n in range(TESTS)])
    pd.DataFrame({"id": ids, "label": 0}).to_csv(tmp_path / "sample_submission.csv", index=False)
    return tmp_path / "sample_submission.csv"


def test_a_submission_has_the_samples_ids_in_its_order(run: Path, sample: Path, tmp_path: Path) -> None:
    _, new = write_submission(Run(run), sample, tmp_path / "out" / "a.csv")
    written = pd.read_csv(tmp_path / "out" / "a.csv")
    test = pd.read_csv(run / "test.csv").set_index("id")["probability"]
    assert new
    assert written.columns.tolist() == ["id", "label"]
    assert written["id"].tolist() == pd.read_csv(sample)["id"].tolist()
    np.testing.assert_array_equal(written["label"], test[written["id"]])
    beside = read_json(tmp_path / "out" / "a.json")
    metrics = read_json(run / "metrics.json")
    assert {key: beside[key] for key in beside if key not in ("commit", "packages")} == {
        "sha256": file_sha256(tmp_path / "out" / "a.csv"),
        "run": "a",
        "members": {"a": 1.0},
        "method": "mean",
        "oof_auc": metrics["pooled"],
        "oof_auc_ranked": metrics["ranked"],
        "fold_auc": metrics["fold_auc"],
        "missing_folds": [],
        "public_score": None,
        "private_score": None,
    }
    assert beside["packages"]["torch"]
    assert "commit" in beside


def test_a_single_patch_may_have_any_value(run: Path, tmp_path: Path) -> None:
    pair = pd.DataFrame({"id": ["t00", "t01"], "probability": [0.5, 0.5]})
    with pytest.raises(UserError, match=r"a: all predictions are 0\.5"):
        submission(pair, pair["id"], run, run)
    for value in (0.0, 1.0):
        test = pd.DataFrame({"id": ["t00"], "probability": [value]})
        assert submission(test, pd.Series(["t00"]), run, run)["label"].tolist() == [value]
    with pytest.raises(UserError, match=r"2 of 3 ids have no prediction in .* \(t01, t02\)"):
        submission(test, pd.Series(["t00", "t01", "t02"]), run, run)
    with pytest.raises(UserError, match=r"1 of 1 ids are not in .* \(t00\)"):
        submission(test, pd.Series([], dtype=str), run, run)


def test_changed_predictions_are_not_submitted(run: Path, sample: Path, tmp_path: Path) -> None:
    (run / "test.csv").write_text((run / "test.csv").read_text() + "more,0.5\n")
    with pytest.raises(UserError, match=r"a/test\.csv: has changed since it was blended"):
        write_submission(Run(run), sample, tmp_path / "a.csv")
    blend([member("a", 1, 1)], "mean", Run(run))
    metrics = read_json(run / "metrics.json")
    for key in ("members", "test_sha256"):
        write_json(run / "metrics.json", {name: value for name, value in metrics.items() if name != key})
        with pytest.raises(UserError, match=r"metrics\.json"):
            write_submission(Run(run), sample, tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_a_submission_is_never_overwritten(run: Path, sample: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    write_submission(Run(run), sample, target)
    assert write_submission(Run(run), sample, target)[1] is False
    target.with_suffix(".json").unlink()
    assert write_submission(Run(run), sample, target)[1] is True
    assert target.with_suffix(".json").exists()
    target.write_text("id,label\nmine,0.5\n")
    with pytest.raises(UserError, match="another submission"):
        write_submission(Run(run), sample, target)
    assert target.read_text() == "id,label\nmine,0.5\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.iloc[1:], "have no prediction"),
        (lambda table: pd.concat([table, pd.DataFrame({"id": ["more"], "probability": [0.5]})]), "are not in"),
        (lambda table: table.assign(probability=table["probability"] + 0.5), "outside of"),
        (lambda table: table.assign(probability=table["probability"] - 0.5), "outside of"),
        (lambda table: table.assign(probability=0.5), "all predictions are 0.5"),
        (lambda table: table.assign(probability=np.nan), "not finite|not a number|nan|could not"),
    ],
)
def test_an_invalid_submission_is_not_written(
    spoil: Callable[[pd.DataFrame], pd.DataFrame], message: str, run: Path, sample: Path, tmp_path: Path
) -> None:
    write_csv(run / "test.csv", spoil(pd.read_csv(run / "test.csv")))
    write_json(run / "metrics.json", read_json(run / "metrics.json") | {"test_sha256": file_sha256(run / "test.csv")})
    with pytest.raises(UserError, match=message):
        write_submission(Run(run), sample, tmp_path / "out" / "a.csv")
    assert not (tmp_path / "out").exists()
