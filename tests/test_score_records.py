"""The recorded scores of benchmarks/SCORES.md."""

import pandas as pd
import pytest

from benchmarks import scores


def test_the_page_has_the_scores_of_the_recorded_probabilities() -> None:
    scored = scores.Scored.load()
    recorded = {name: record["scores"] for name, record in scored.records.items()}
    scores.add_blend(scored)
    for name in ("bottleneck", "pretrained", "blend", "lite0-probe-224"):
        assert scores.score(scored, name, scores.BY_LABEL) == recorded[name]
        assert f"{recorded[name]['held_out'][0]:.4f}" in scores.PAGE.read_text()


def test_a_row_with_other_patches_is_refused() -> None:
    table = pd.DataFrame({"label": [0, 1, 1]}, index=["a", "b", "c"])
    predicted = pd.DataFrame({"id": ["a", "c"], "probability": [0.1, 0.2]})
    with pytest.raises(scores.UserError, match="other patches"):
        scores._add_column(table, "run", predicted, "probability", table["label"] == 1)
    scores._add_column(table, "run", predicted, "probability", pd.Series([True, False, True], table.index))
    assert table["run"].dropna().to_dict() == {"a": 0.1, "c": 0.2}
