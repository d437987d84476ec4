"""The leaderboard: local scores beside Kaggle's, only those that are of the present nets, and their correlation."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Others
from pcam_kaggle.kaggle.leaderboard import leaderboard, render_leaderboard

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.scoring.held_out import Mixture, recorded_auc


@pytest.fixture
def workspace(finished_run: Path, others: Others) -> Workspace:
    """Return the workspace of a finished run that was evaluated on other patches."""
    assert main(["evaluate", "bottleneck", "--work", str(finished_run), *others.options]) == 0
    return Workspace(finished_run, finished_run / "store")


def test_the_auc_on_other_slides_is_that_of_evaluate(workspace: Workspace) -> None:
    evaluated = json.loads((workspace.evaluations / "others" / "result.json").read_text())["runs"][0]
    (row,) = leaderboard(workspace).itertuples()
    assert (row.name, row.others_nets) == ("bottleneck", 3)
    assert row.others == pytest.approx(evaluated["mean"]["value"], abs=1e-9)
    assert "(3 nets)" in render_leaderboard(leaderboard(workspace))


def test_an_evaluation_of_former_nets_is_not_shown(workspace: Workspace) -> None:
    file = workspace.run("bottleneck") / "fold_1" / "best.pt"
    torch.save(torch.load(file, weights_only=True) | {"more": 1}, file)
    (row,) = leaderboard(workspace).itertuples()
    assert np.isnan(row.others)
    assert row.others_nets == 0


@pytest.mark.parametrize(
    ("ranked", "weights"), [(False, {"a": 0.5, "b": 0.5}), (True, {"a": 0.5, "b": 0.5}), (False, {"a": 0.9, "b": 0.1})]
)
def test_the_auc_of_a_blend_is_that_of_its_mixture(ranked: bool, weights: dict[str, float]) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 50)
    tables = {
        name: pd.DataFrame(
            {"id": [f"{n:02}" for n in range(50)], "label": labels, "fold_0": rng.random(50), "fold_1": rng.random(50)}
        )
        for name in weights
    }

    class Stored:
        def current(self, run: str) -> pd.DataFrame | None:
            return tables.get(run)

    area, nets = recorded_auc(Stored(), Mixture("both", weights, ranked), {name: name for name in weights})  # type: ignore[arg-type]
    values = {
        name: [table[f"fold_{n}"].rank() if ranked else table[f"fold_{n}"] for n in (0, 1)] for name, table in tables.items()
    }
    score = sum(weight * (values[name][0] + values[name][1]) for name, weight in weights.items())
    ranks = pd.Series(score).rank()
    positives = labels.sum()
    expected = (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * (50 - positives))
    # Equal sums of ranks may differ in their last digit.
    assert (area, nets) == (pytest.approx(expected, abs=0.002 if ranked else 1e-9), 2)
    # Members join by id.
    tables["b"] = tables["b"].sample(frac=1, random_state=0)
    assert recorded_auc(Stored(), Mixture("both", weights, ranked), {name: name for name in weights})[0] == pytest.approx(area)  # type: ignore[arg-type]
    # A member that lacks an evaluation makes the blend's unknown.
    del tables["b"]
    assert recorded_auc(Stored(), Mixture("both", weights, ranked), {name: name for name in weights})[1] == 0  # type: ignore[arg-type]


def scored(count: int) -> pd.DataFrame:
    """Return a leaderboard of `count` submissions, of which the better locally are the worse on Kaggle but for one."""
    local = np.linspace(0.9, 0.95, count)
    private = 1 - local
    private[-1] = 0.99
    columns = {"oof_auc": local, "oof_low": local - 0.01, "oof_high": local + 0.01, "oof_unit": "patch"}
    kaggle = {"public_score": np.nan, "private_score": private}
    return pd.DataFrame({"name": [f"run{n}" for n in range(count)], **columns, **kaggle})


def test_local_and_private_scores_are_correlated_from_four_submissions_on() -> None:
    assert "correlation" not in render_leaderboard(scored(3))
    printed = render_leaderboard(scored(5))
    expected = scored(5)["oof_auc"].rank().corr(scored(5)["private_score"].rank())
    assert f"OOF AUC and private score of 5 submissions: Spearman's rank correlation {expected:.2f}" in printed
    assert "public score" not in printed
    same = scored(5).assign(private_score=0.9)
    assert "n/a (all scores equal)" in render_leaderboard(same)


def test_the_best_private_score_comes_first(workspace: Workspace) -> None:
    for name, private in (("second", 0.9), ("first", 0.95), ("third", None)):
        made = json.loads((workspace.submissions / "bottleneck.json").read_text()) | {"private_score": private}
        (workspace.submissions / f"{name}.json").write_text(json.dumps(made))
    assert leaderboard(workspace)["name"].tolist()[:2] == ["first", "second"]
    assert render_leaderboard(leaderboard(Workspace(workspace.root / "none", workspace.store))) == "no submissions yet"
