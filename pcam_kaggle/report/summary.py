"""The result of a session as Markdown: a table of the runs, and what to do next."""

from collections.abc import Sequence

from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import interval_text

RESUME = "attach this notebook's output as an input (*Add Input*, *Your Work*) and run it again with the same settings"


def summary(made: Sequence[Run], planned: Sequence[Run]) -> str:
    """Return the OOF AUC of the blended runs, and the next step.

    Args:
        made: The blended run, and the runs that it blends if it is a blend; none if no fold was finished.
        planned: The runs that the session was to train.

    Raises:
        UserError: The score of a run is missing or damaged.
    """
    runs = {run.name: run for run in made}
    if not runs:
        return f"**Next step:** no fold was finished in time; {RESUME}. Every fold continues after its last epoch."
    scores = [run.blend_metrics(folds=list, fold_auc=list, missing_folds=list, pooled=dict) for run in runs.values()]
    areas = [dict(zip(score["folds"], score["fold_auc"], strict=True)) for score in scores]
    pooled = [score["pooled"] for score in scores]
    missing = sorted({fold for score in scores for fold in score["missing_folds"]})
    rows = [["run", *(f"`{name}`" for name in runs)], ["---"] * (len(runs) + 1)]
    rows.append(["OOF AUC", *(f"**{each['value']:.4f}**" for each in pooled)])
    rows.append(["95 % interval", *(interval_text(each["low"], each["high"], each["undefined"]) for each in pooled)])
    rows.append(["unit of the interval", *(each["unit"] for each in pooled)])
    folds = sorted({*missing, *(fold for area in areas for fold in area)})
    rows += [[f"fold {n}", *(f"{area[n]:.4f}" if n in area else "missing" for area in areas)] for n in folds]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    unfinished = [*(f"fold {fold}" for fold in missing), *(f"run `{run.name}`" for run in planned if run.name not in runs)]
    return f"{table}\n\n{_next_step(unfinished)}"


def _next_step(unfinished: Sequence[str]) -> str:
    if unfinished:
        return f"**Next step:** not finished in time: {', '.join(unfinished)}. To train the rest, {RESUME}."
    return (
        "**Next step:** *Submit to Competition* sends `submission.csv`. In the clone, `make kernel-output` downloads the runs "
        "to compare and blend them."
    )
