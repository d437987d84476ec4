"""The result of a session as Markdown: the score of each run, and what to do next."""

from collections.abc import Sequence

from pcam_kaggle.core.errors import program
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.tables import score_lines

RESUME = "attach this notebook's output as an input (*Add Input*, *Your Work*) and run it again with the same settings"


def summary(made: Sequence[Run], planned: Sequence[Run]) -> str:
    """Return the OOF AUC of the blended runs `made` of those `planned`, none if no fold was finished, and the next step."""
    scores = {run.name: run.blend_metrics() for run in made}
    if not scores:
        return f"**Next step:** no fold was finished in time; {RESUME}. Every fold continues after its last epoch."
    parts = [f"**`{name}`**\n\n" + "\n".join(f"- {line}" for line in score_lines(score)) for name, score in scores.items()]
    unfinished = sorted({f"fold {fold}" for score in scores.values() for fold in score.missing_folds})
    unfinished += [f"run `{run.name}`" for run in planned if run.name not in scores]
    if unfinished:
        next_step = f"not finished in time: {', '.join(unfinished)}. To train the rest, {RESUME}."
    else:
        next_step = (
            f"*Submit to Competition* sends `submission.csv`. In the clone, `{program()} kaggle fetch` downloads the runs to "
            "compare and blend them."
        )
    return "\n\n".join([*parts, f"**Next step:** {next_step}"])
