"""Scores on labelled patches as text, Markdown, CSV or JSON."""

import json
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.scoring.held_out import Score, Scores
from pcam_kaggle.scoring.metrics import interval_text, json_fields
from pcam_kaggle.scoring.render import markdown, p_text

# What `result_json` returns.
Result = dict[str, Any]


def result_json(name: str, patches_sha256: str, scores: Scores) -> Result:
    """Return `scores` on the set of patches `name` with this hash for JSON; undefined numbers are None."""
    return {
        "name": name,
        "patches_sha256": patches_sha256,
        "patches": scores.patches,
        "positives": scores.positives,
        "unit": scores.unit,
        "baseline": scores.baseline,
        "runs": [_record(score) for score in scores.scores],
    }


def _record(score: Score) -> dict[str, Any]:
    difference = json_fields(score.difference) | {"corrected_p": score.corrected_p} if score.difference else None
    return {
        "run": score.name,
        "fold_auc": {str(number): area for number, area in score.fold_auc.items()},
        "single": score.single,
        "mean": json_fields(score.mean),
        "oof_auc": {str(number): area for number, area in score.oof_auc.items()},
        "fall": score.fall,
        "calibration_error": score.calibration,
        "difference": difference,
        "changed": score.changed,
    }


def score_table(result: Result) -> pd.DataFrame:
    """Return one row per run as text: AUC of its nets and of their mean, OOF AUC and fall from it, calibration, difference."""
    return pd.DataFrame([_row(run, result["baseline"]) for run in result["runs"]])


def _row(run: dict[str, Any], baseline: str) -> dict[str, str]:
    areas, oof = [*run["fold_auc"].values()], [*run["oof_auc"].values()]
    deviation = f" ± {np.std(areas, ddof=1):.4f}" if len(areas) > 1 else ""
    row = {
        "run": run["run"],
        "nets": str(len(areas)),
        "single net": f"{run['single']:.4f}{deviation}",
        "mean of nets": f"{run['mean']['value']:.4f} {_interval(run['mean'], '.4f')}",
        "OOF": f"{np.mean(oof):.4f}" if oof else "n/a",
        "fall": "n/a" if run["fall"] is None else f"{run['fall']:+.4f}",
        "calibration error": "n/a" if run["calibration_error"] is None else f"{run['calibration_error']:.4f}",
        f"minus {baseline}": "",
        "p": "",
    }
    difference = run["difference"]
    if difference:
        row[f"minus {baseline}"] = f"{difference['value']:+.4f} {_interval(difference, '+.4f')}"
        p = difference["corrected_p"]
        row["p"] = "n/a" if p is None else p_text(p).removeprefix("p ").removeprefix("= ")
    return row


def _interval(fields: dict[str, Any], form: str) -> str:
    return interval_text(fields["low"], fields["high"], fields["undefined"], form)


def perturbation_table(result: Result) -> pd.DataFrame:
    """Return one row per perturbation as text: AUC of the mean of the nets of each run, and its change; empty without any."""
    runs = result["runs"]
    return pd.DataFrame(
        {"perturbation": change}
        | {run["run"]: f"{run['changed'][change]:.4f} ({run['changed'][change] - run['mean']['value']:+.4f})" for run in runs}
        for change in runs[0]["changed"]
    )


def caption(result: Result) -> str:
    """Return what the columns of `score_table` are."""
    test = "DeLong's interval and paired test" if result["unit"] == "patch" else "bootstrap over slides"
    return (
        f"{result['patches']:,} patches, {result['positives'] / result['patches']:.1%} with tumour. Single net: mean ± SD over "
        "the nets of the folds. OOF: mean over folds; fall: OOF minus single net. Intervals: 95 % "
        f"({test}, unit: {result['unit']}); p is corrected for the number of runs (Holm)."
    )


def render_evaluation(result: Result, form: str) -> str:
    """Return `result` as `text`, `md`, `csv` or `json`; only `csv` and `json` have full precision."""
    if form == "json":
        return json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if form == "csv":
        shared = {key: result[key] for key in ("name", "patches", "positives", "unit", "baseline")}
        rows = [shared | {key: value for key, value in run.items() if value is not None} for run in result["runs"]]
        return pd.json_normalize(rows).to_csv(index=False)
    tables = [table for table in (score_table(result), perturbation_table(result)) if len(table)]
    texts = [markdown(table) if form == "md" else f"{table.to_string(index=False)}\n" for table in tables]
    return "\n".join([f"{result['name']}:\n", *texts, f"{caption(result)}\n"])
