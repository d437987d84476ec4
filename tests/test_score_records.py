"""The recorded scores of benchmarks/SCORES.md."""

from benchmarks import scores


def test_the_page_has_the_scores_of_the_recorded_probabilities() -> None:
    scored = scores.Scored.load()
    recorded = {name: record["scores"] for name, record in scored.records.items()}
    scores.add_blend(scored)
    for name in ("bottleneck", "pretrained", "blend", "lite0-probe-224"):
        assert scores.score(scored, name, scores.BY_LABEL) == recorded[name]
        assert f"{recorded[name]['held_out'][0]:.4f}" in scores.PAGE.read_text()
