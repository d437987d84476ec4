"""Folds: the same bytes for the same labels, stratified, and no slide in two of them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import csv_bytes, file_sha256, read_json, sha256
from pcam_kaggle.data.folds import UNMAPPED, Scheme, draw_folds, find_folds, given_folds, load_folds, make_folds, read_groups
from pcam_kaggle.data.tables import draw_subset, labels_sha256, read_labels, read_slides

PLAIN = Scheme(5, "stratified")
SLIDES = Scheme(5, "slides")


@pytest.fixture
def labels() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"id": [f"{n:040x}" for n in rng.permutation(1000)], "label": (rng.random(1000) < 0.4).astype(np.int8)})


@pytest.fixture
def slides(labels: pd.DataFrame) -> pd.DataFrame:
    """Return a map of the labels to 40 slides of very different sizes."""
    rng = np.random.default_rng(1)
    share = rng.dirichlet(np.ones(40))
    return pd.DataFrame({"id": labels["id"], "wsi": [f"slide_{n}" for n in rng.choice(40, len(labels), p=share)]})


@pytest.mark.parametrize("scheme", [PLAIN, SLIDES])
def test_the_order_of_rows_does_not_matter(labels: pd.DataFrame, slides: pd.DataFrame, scheme: Scheme, tmp_path: Path) -> None:
    for number in range(3):
        for table, name in ((labels, "labels.csv"), (slides, "map.csv")):
            table.sample(frac=1, random_state=number).to_csv(tmp_path / name, index=False)
        known = read_slides(tmp_path / "map.csv") if scheme is SLIDES else None
        make_folds(read_labels(tmp_path / "labels.csv"), scheme, known, tmp_path / str(number))
    for name in (f"{scheme.name}.csv", f"{scheme.name}.json"):
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(3)}) == 1


def test_labels_are_spread_evenly_by_seed(labels: pd.DataFrame) -> None:
    table = draw_folds(labels, PLAIN, None)
    per_fold = table.groupby("fold")["label"].agg(["size", "sum"])
    assert (np.ptp(per_fold, axis=0) <= 1).all()
    other = Scheme(5, "stratified", seed=43)
    assert not table.equals(draw_folds(labels, other, None))
    assert PLAIN.name != other.name


def test_a_subset_is_stratified_and_independent_of_the_order_of_rows(labels: pd.DataFrame, tmp_path: Path) -> None:
    drawn = []
    for number in range(2):
        labels.sample(frac=1, random_state=number).to_csv(tmp_path / "labels.csv", index=False)
        drawn.append(draw_subset(read_labels(tmp_path / "labels.csv"), 100))
    pd.testing.assert_frame_equal(*drawn)
    assert (len(drawn[0]), drawn[0]["label"].sum()) == (100, round(labels["label"].mean() * 100))
    assert drawn[0]["id"].is_monotonic_increasing


def test_no_slide_lies_in_two_folds(labels: pd.DataFrame, slides: pd.DataFrame) -> None:
    table = draw_folds(labels, SLIDES, slides)
    assert table.groupby("group")["fold"].nunique().max() == 1
    assert draw_folds(labels, PLAIN, None).merge(slides, on="id").groupby("wsi")["fold"].nunique().max() > 1


def test_ids_that_the_map_lacks_share_one_fold(labels: pd.DataFrame, slides: pd.DataFrame, tmp_path: Path) -> None:
    known = slides.iloc[50:]
    table = draw_folds(labels, SLIDES, known)
    lacking = table[table["group"] == UNMAPPED]
    assert set(lacking["id"]) == set(slides["id"][:50])
    assert len(set(lacking["fold"])) == 1
    assert make_folds(labels, SLIDES, known, tmp_path)[0].manifest.unmapped == 50
    groups = read_groups(tmp_path / f"{SLIDES.name}.csv").reset_index(drop=True)
    pd.testing.assert_frame_equal(groups, known.sort_values("id", ignore_index=True))
    with pytest.raises(UserError, match="lacks 201 of 1,000 ids, more than fit into one of 5 folds"):
        draw_folds(labels, SLIDES, slides.iloc[201:])
    assert draw_folds(labels, SLIDES, slides.iloc[200:])["group"].eq(UNMAPPED).sum() == 200
    assert read_groups(tmp_path / "none.csv") is None
    make_folds(labels, PLAIN, None, tmp_path)
    assert read_groups(tmp_path / f"{PLAIN.name}.csv") is None


@pytest.mark.parametrize("scheme", [PLAIN, SLIDES])
def test_the_manifest_tells_what_was_drawn(labels: pd.DataFrame, slides: pd.DataFrame, scheme: Scheme, tmp_path: Path) -> None:
    by_slide = scheme is SLIDES
    folds, _ = make_folds(labels, scheme, slides if by_slide else None, tmp_path)
    counts = folds.table.groupby("fold")["label"].agg(["size", "sum"])
    groups_per_fold = folds.table.merge(slides, on="id").groupby("fold")["wsi"].nunique()
    expected = {
        "scheme": "slides_5_42" if by_slide else "stratified_5_42",
        "n_splits": 5,
        "seed": 42,
        "patches": counts["size"].tolist(),
        "positives": counts["sum"].tolist(),
        "slides": groups_per_fold.tolist() if by_slide else None,
        "unmapped": 0 if by_slide else None,
        "labels_sha256": labels_sha256(labels.sort_values("id")),
        "slides_sha256": sha256(csv_bytes(slides)) if by_slide else None,
        "csv_sha256": file_sha256(tmp_path / f"{scheme.name}.csv"),
    }
    assert folds.manifest.model_dump() == read_json(tmp_path / f"{scheme.name}.json") == expected
    assert folds.table.columns.tolist() == ["id", "label", "fold"]
    written = pd.read_csv(tmp_path / f"{scheme.name}.csv")
    assert written.columns.tolist() == ["id", "label", "fold", *(["group"] if by_slide else [])]
    assert written["id"].tolist() == sorted(labels["id"])


def test_folds_of_other_labels_are_refused(labels: pd.DataFrame, tmp_path: Path) -> None:
    make_folds(labels, PLAIN, None, tmp_path)
    changed = labels.assign(label=labels["label"].where(labels.index != 5, 1 - labels["label"]))
    for action in (make_folds, load_folds):
        with pytest.raises(UserError, match="belongs to other labels"):
            action(changed, PLAIN, None, tmp_path)


@pytest.mark.parametrize("lost", ["csv", "json"])
def test_a_lost_half_is_made_again(labels: pd.DataFrame, lost: str, tmp_path: Path) -> None:
    make_folds(labels, PLAIN, None, tmp_path)
    files = [tmp_path / f"{PLAIN.name}.{kind}" for kind in ("csv", "json")]
    before = [file.read_bytes() for file in files]
    (tmp_path / f"{PLAIN.name}.{lost}").unlink()
    with pytest.raises(UserError, match="it or its manifest is missing; run `python -m pcam_kaggle folds`"):
        load_folds(labels, PLAIN, None, tmp_path)
    assert make_folds(labels, PLAIN, None, tmp_path)[1]
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(("kind", "old", "new"), [("csv", ",0\n", ",1\n"), ("json", '"seed": 42', '"seed": 43')])
def test_an_edited_file_is_refused(kind: str, old: str, new: str, labels: pd.DataFrame, tmp_path: Path) -> None:
    make_folds(labels, PLAIN, None, tmp_path)
    file = tmp_path / f"{PLAIN.name}.{kind}"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match="has changed since"):
        load_folds(labels, PLAIN, None, tmp_path)


@pytest.mark.parametrize("scheme", [PLAIN, SLIDES])
def test_a_kept_file_is_read_back_equal(labels: pd.DataFrame, slides: pd.DataFrame, scheme: Scheme, tmp_path: Path) -> None:
    # Ids and slides that look like numbers are still text.
    names = {name: f"{number:06d}" for number, name in enumerate(labels["id"])}
    labels = labels.assign(id=labels["id"].map(names))
    slides = slides.assign(id=slides["id"].map(names), wsi=slides["wsi"].str.removeprefix("slide_"))
    known, other = (slides, slides.iloc[1:]) if scheme is SLIDES else (None, slides)
    made, new = make_folds(labels, scheme, known, tmp_path)
    kept, again = make_folds(labels, scheme, known, tmp_path)
    assert (new, again) == (True, False)
    assert made.manifest == kept.manifest
    pd.testing.assert_frame_equal(made.table, kept.table, check_dtype=False)
    with pytest.raises(UserError, match="belongs to another slide map"):
        load_folds(labels, scheme, other, tmp_path)


def test_too_few_of_anything_is_said(labels: pd.DataFrame, slides: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="fewer patches"):
        draw_folds(labels.assign(label=[1, 1, *[0] * 998]), PLAIN, None)
    draw_folds(labels.assign(label=[1] * 5 + [0] * 995), PLAIN, None)
    one_sided = slides.assign(wsi=np.where(labels["label"] == 1, "all", slides["wsi"]))
    with pytest.raises(UserError, match="a fold has only one label"):
        draw_folds(labels, SLIDES, one_sided)
    with pytest.raises(UserError, match="3 slides can't fill 5 folds"):
        draw_folds(labels, SLIDES, slides.assign(wsi=[f"slide_{n % 3}" for n in range(1000)]))


def test_given_folds_are_named_by_content_and_found_by_it(labels: pd.DataFrame, slides: pd.DataFrame, tmp_path: Path) -> None:
    labels, file, names = labels.sort_values("id", ignore_index=True), tmp_path / "given.csv", []
    table = draw_folds(labels, SLIDES, slides[50:])
    for columns in (["id", "fold"], ["id", "fold", "group"], ["id", "fold", "group"]):
        table[columns].replace(UNMAPPED, "").sample(frac=1).to_csv(file, index=False)
        scheme, groups = given_folds(file, labels)
        assert make_folds(labels, scheme, groups, tmp_path)[1] == (scheme.name not in names)
        names.append(scheme.name)
        assert find_folds(table, tmp_path).scheme == scheme.name
    assert names[1] == names[2] == f"grouped_{sha256(csv_bytes(table))[:8]}"
    make_folds(labels, SLIDES, slides[50:], tmp_path)
    assert find_folds(table, tmp_path).scheme == SLIDES.name
    assert given_folds(file, labels, 100)[0].given["id"].tolist() == draw_subset(labels, 100)["id"].tolist()
    with pytest.raises(UserError, match=r"lacks a label; each needs both, also in subset=6; choose a larger one$"):
        given_folds(file, labels, 6)
    for file in tmp_path.glob("*.csv"):
        file.write_text("id,label\n")
    assert find_folds(table, tmp_path) is None
