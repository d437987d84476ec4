"""Blending joins by id, weights only where they earn it, and a submission is exactly what Kaggle asks for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pcam_kaggle.artifacts import file_sha256, read_json, write_csv, write_json
from pcam_kaggle.blend import Member, blend, climb, cross_climb, read_member
from pcam_kaggle.errors import UserError
from pcam_kaggle.metrics import auc
from pcam_kaggle.submission import submit

N, TESTS, FOLDS = 600, 50, 3
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, N)
FOLD = np.arange(N) % FOLDS
IDS = np.array([f"p{n:03d}" for n in range(N)])


def member(name: str, noise: float, seed: int) -> Member:
    """Return an experiment whose logits are the label plus `noise`."""
    rng = np.random.default_rng(seed)
    probability = 1 / (1 + np.exp(-(LABELS - 0.5 + noise * rng.normal(size=N))))
    oof = pd.DataFrame({"id": IDS, "label": LABELS, "fold": FOLD, "probability": probability})
    ids = [f"t{n:02d}" for n in range(TESTS)]
    tests = [pd.DataFrame({"id": ids, "probability": rng.random(TESTS)}) for _ in range(FOLDS)]
    return Member(name, oof, tests, "same", [])


def write_run(run: Path, made: Member, order: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Write the fold tables of a run, their rows in the order that `order` gives."""
    write_json(run / "config.json", {"config": {"n_splits": FOLDS}, "folds_sha256": made.folds})
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
        read = [read_member(tmp_path / str(number) / made.name) for made in members]
        blend(read, method, tmp_path / str(number) / "ab")
        outputs.append(
            [(tmp_path / str(number) / "ab" / name).read_bytes() for name in ("oof.csv", "test.csv", "metrics.json")]
        )
    assert outputs[0] == outputs[1]


def test_the_mean_of_folds_is_the_mean(tmp_path: Path) -> None:
    alone = member("a", 1, 1)
    metrics, new = blend([alone], "mean", tmp_path / "a")
    test = pd.read_csv(tmp_path / "a" / "test.csv")
    expected = np.mean([table["probability"] for table in alone.tests], axis=0)
    np.testing.assert_allclose(test["probability"], expected, rtol=1e-12)
    assert new
    assert metrics["pooled"]["value"] == auc(LABELS, alone.oof["probability"].to_numpy())
    assert metrics["fold_auc"][1] == auc(LABELS[FOLD == 1], alone.oof["probability"].to_numpy()[FOLD == 1])
    assert blend([alone], "mean", tmp_path / "a") == (metrics, False)


def test_ranks_do_not_see_a_folds_scale(tmp_path: Path) -> None:
    alone = member("a", 1, 1)
    scale = np.array([1.0, 0.1, 0.01])
    tests = [table.assign(probability=table["probability"] * scale[fold]) for fold, table in enumerate(alone.tests)]
    bent = Member("a", alone.oof.assign(probability=alone.oof["probability"] * scale[FOLD]), tests, "same", [])
    first, second = (blend([made], "rank", tmp_path / name / "a")[0] for name, made in (("first", alone), ("second", bent)))
    assert first["oof_sha256"] == second["oof_sha256"]
    assert first["test_sha256"] == second["test_sha256"]
    plain = blend([bent], "mean", tmp_path / "third" / "a")[0]
    assert plain["pooled"]["value"] < plain["ranked"]["value"] == pytest.approx(first["pooled"]["value"])


def test_climbing_finds_the_good_member_and_uses_it(tmp_path: Path) -> None:
    members = [member("good", 0.4, 1), *(member(f"bad{n}", 8, n) for n in (2, 3, 4))]
    metrics, _ = blend(members, "climb", tmp_path / "ab")
    assert metrics["method"] == "climb"
    assert metrics["members"]["good"] > 0.9
    assert metrics["gain_of_weights"]["low"] > 0


def test_climbing_falls_back_to_the_mean_within_the_noise(tmp_path: Path) -> None:
    members = [member(f"m{n}", 1, n) for n in range(4)]
    metrics, _ = blend(members, "climb", tmp_path / "ab")
    assert metrics["method"] == "mean"
    assert set(metrics["members"].values()) == {0.25}
    oof = pd.read_csv(tmp_path / "ab" / "oof.csv")
    np.testing.assert_allclose(oof["probability"], np.mean([made.oof["probability"] for made in members], axis=0))


def test_weights_of_a_fold_do_not_see_its_labels() -> None:
    values = np.stack([member(f"m{n}", 1 + n, n).oof["probability"] for n in range(4)])
    inside = FOLD == 1
    # A member that knows the labels of one fold alone: only weights that see them would use it there.
    spy = np.where(inside, LABELS, np.random.default_rng(9).random(N))
    values = np.vstack([values, spy])
    blended, _ = cross_climb(LABELS, FOLD, values)
    others, _ = cross_climb(np.where(inside, 1 - LABELS, LABELS), FOLD, values)
    np.testing.assert_array_equal(blended[inside], others[inside])
    assert climb(LABELS, values).sum() == pytest.approx(1)


def test_members_must_share_folds_and_test_ids(tmp_path: Path) -> None:
    first, second = member("a", 1, 1), member("b", 1, 2)
    with pytest.raises(UserError, match="other folds"):
        blend([first, Member("b", second.oof, second.tests, "other", [])], "mean", tmp_path / "ab")
    fewer = [table.iloc[1:].reset_index(drop=True) for table in second.tests]
    with pytest.raises(UserError, match="test ids"):
        blend([first, Member("b", second.oof, fewer, "same", [])], "mean", tmp_path / "ab")


def test_a_blend_does_not_overwrite_an_experiment(tmp_path: Path) -> None:
    write_json(tmp_path / "plain" / "config.json", {})
    with pytest.raises(UserError, match="--name"):
        blend([member("a", 1, 1), member("b", 1, 2)], "mean", tmp_path / "plain")


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", member("a", 1, 1), lambda table: table)
    file = tmp_path / "a" / "fold_1" / "test.csv"
    file.write_text(file.read_text()[:-10])
    with pytest.raises(UserError, match=r"fold_1/test.csv: missing or changed"):
        read_member(tmp_path / "a")
    (tmp_path / "a" / "fold_0" / "predictions.json").unlink()
    with pytest.raises(UserError, match=r"fold_0: no predictions"):
        read_member(tmp_path / "a")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a blended run."""
    blend([member("a", 1, 1)], "mean", tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Return a sample submission in an order of its own."""
    ids = np.random.default_rng(5).permutation([f"t{n:02d}" for n in range(TESTS)])
    pd.DataFrame({"id": ids, "label": 0}).to_csv(tmp_path / "sample_submission.csv", index=False)
    return tmp_path / "sample_submission.csv"


def test_a_submission_has_the_samples_ids_in_its_order(run: Path, sample: Path, tmp_path: Path) -> None:
    _, new = submit(run, sample, tmp_path / "out" / "a.csv")
    written = pd.read_csv(tmp_path / "out" / "a.csv")
    test = pd.read_csv(run / "test.csv").set_index("id")["probability"]
    assert new
    assert written.columns.tolist() == ["id", "label"]
    assert written["id"].tolist() == pd.read_csv(sample)["id"].tolist()
    np.testing.assert_array_equal(written["label"], test[written["id"]])
    beside = read_json(tmp_path / "out" / "a.json")
    assert beside["members"] == {"a": 1.0}
    assert beside["oof_auc"] == read_json(run / "metrics.json")["pooled"]


def test_a_submission_is_never_overwritten(run: Path, sample: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    submit(run, sample, target)
    assert submit(run, sample, target)[1] is False
    target.write_text("id,label\nmine,0.5\n")
    with pytest.raises(UserError, match="another submission"):
        submit(run, sample, target)
    assert target.read_text() == "id,label\nmine,0.5\n"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda table: table.iloc[1:], "has no prediction"),
        (lambda table: pd.concat([table, pd.DataFrame({"id": ["more"], "probability": [0.5]})]), "is not in"),
        (lambda table: table.assign(probability=1.5), "outside of"),
        (lambda table: table.assign(probability=0.5), "all predictions are 0.5"),
        (lambda table: table.assign(probability=np.nan), "not finite|not a number|nan|could not"),
    ],
)
def test_what_kaggle_would_refuse_is_not_written(
    spoil: Callable[[pd.DataFrame], pd.DataFrame], said: str, run: Path, sample: Path, tmp_path: Path
) -> None:
    write_csv(run / "test.csv", spoil(pd.read_csv(run / "test.csv")))
    write_json(run / "metrics.json", read_json(run / "metrics.json") | {"test_sha256": file_sha256(run / "test.csv")})
    with pytest.raises(UserError, match=said):
        submit(run, sample, tmp_path / "out" / "a.csv")
    assert not (tmp_path / "out").exists()
