"""Results as text, Markdown, CSV or JSON: the score of a blend, a comparison of runs, and scores on a held-out set."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.held_out import EvaluationResult
from pcam_kaggle.scoring.metrics import Floats, Labels, operating_points
from pcam_kaggle.scoring.results import BlendMetrics, Difference, Estimate, Family

FAMILIES: dict[Family, str] = {
    "holm": "p-values are corrected for their number (Holm)",
    "baseline": "intervals and p hold for all differences to the baseline at once (Dunnett)",
    "all pairs": "intervals and p hold for all pairs of runs at once",
}

REFERENCES: dict[Family, str] = {"baseline": "the baseline", "all pairs": "the highest AUC"}


def score_lines(metrics: BlendMetrics) -> list[str]:
    """Return the OOF AUC as lines of text: per fold, pooled, and missing folds."""
    folds = zip(metrics.folds, metrics.patches, metrics.fold_auc, strict=True)
    lines = [f"fold {fold}   {size:>7,} patches   OOF AUC {area:.4f}" for fold, size, area in folds]
    deviation = "" if metrics.sd is None else f" ± {metrics.sd:.4f} (SD over folds)"
    lines.append(f"mean     {metrics.mean:.4f}{deviation}")
    for title, estimate in (("pooled", metrics.pooled), ("pooled after ranking within folds", metrics.ranked)):
        lines.append(f"{title}   {estimate.value:.4f}, 95 % interval {estimate.interval_text()} (unit: {estimate.unit})")
    if metrics.pooled.unit == "patch":
        lines.append("folds may share slides: on held-out slides, models scored up to 0.03 lower (docs/scores.md)")
    if metrics.missing_folds:
        lines.append(f"missing: folds {', '.join(map(str, metrics.missing_folds))}")
    return lines


def describe_difference(run: ComparedRun, reference: ComparedRun) -> str:
    """Return one sentence on the pooled difference of `run` to `reference`, with its interval, p and unit."""
    if run.pooled is None:
        return f"{run.name}: {run.problem or run.unpaired_reason}."
    difference, unit = run.pooled, f"unit: {run.pooled.unit}"
    if difference.corrected_p is None or difference.low is None or difference.high is None:
        reason = f"interval and p n/a ({difference.undefined}; {unit})"
        return f"{run.name} compared with {reference.name}: {difference.value:+.4f}, {reason}."
    p = "p < 0.0001" if difference.corrected_p < 1e-4 else f"p = {difference.corrected_p:.2g}"
    if difference.is_significant:
        better, worse = (run, reference) if difference.value > 0 else (reference, run)
        low, high = sorted([abs(difference.low), abs(difference.high)])
        numbers = f"{abs(difference.value):.4f} [{low:.4f}, {high:.4f}], {p} ({unit})"
        return f"{better.name} is better than {worse.name} by {numbers}."
    numbers = f"{difference.text('+.4f')}, {p}; {unit}"
    return f"{run.name} compared with {reference.name}: no significant difference ({numbers})."


def describe_best(best: list[str], differences: Mapping[str, Difference], reference: str) -> str:
    """Return one sentence on which runs may be the best, of `reference` and those with `differences` to it, tested together."""
    worse = [name for name in differences if name not in best]
    verb = "is" if len(worse) == 1 else "are"
    others = f"; {', '.join(worse)} {verb} significantly worse than another run" if worse else ""
    unit = next(f"unit: {made.unit}" for made in differences.values())
    reasons = dict.fromkeys(f"; differences n/a: {made.undefined}" for made in differences.values() if made.undefined)
    compared = ", ".join([reference, *differences])
    likely = " or ".join(filter(None, [", ".join(best[:-1]), best[-1]]))
    return f"With 95 % confidence, the best of {compared} is {likely}{others} ({unit}{''.join(reasons)})."


def caption(comparison: Comparison) -> str:
    """Return how differences, their intervals and p-values are computed."""
    unit, groups = comparison.unit, comparison.groups
    test = "DeLong's covariance" if groups is None else f"a bootstrap over {unit}s"
    text = f"Folds: {', '.join(map(str, comparison.folds))}. 95 % intervals (unit: {unit}) are from {test}."
    if any(run.pooled for run in comparison.runs):
        text += f" Differences are to {comparison.reference.name}; their {FAMILIES[comparison.family]}."
    return text


def conclusions(comparison: Comparison) -> list[str]:
    """Return sentences: which runs may be the best, or each difference to the baseline; and runs without one."""
    runs, reference = comparison.runs, comparison.reference
    differences = {run.name: run.pooled for run in runs if run.pooled}
    shown = runs if comparison.family == "baseline" else [run for run in runs if run.name not in differences]
    sentences = [describe_difference(run, reference) for run in shown if run is not reference]
    if comparison.best and differences:
        sentences.insert(0, describe_best(comparison.best, differences, reference.name))
    return sentences


def comparison_table(comparison: Comparison) -> pd.DataFrame:
    """Return one row per run, best first; runs that cannot be scored come last.

    Columns: `run`; `fold_0`, ... (AUC); `mean`, `sd`; `pooled` and `ranked` with `_low` and `_high`; their `interval_unit`;
    `difference` with its interval and `p`, also per fold (`difference_0`, `p_0`, ...); `unit`, that of the differences; costs;
    `differs`, the number of config fields that differ between runs; these fields; `note`. Undefined values are NaN; only where
    X is undefined, a column `undefined_X` gives the reason.
    """
    configs = [run.config for run in comparison.runs if run.config]
    fields = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in fields if len({json.dumps(config.get(key)) for config in configs}) > 1]
    areas = {run.name: run.metrics.pooled.value if run.metrics else 0.0 for run in comparison.runs}
    ordered = sorted(comparison.runs, key=lambda run: (bool(run.problem), -areas[run.name]))
    rows = [_row(run, comparison, differing) for run in ordered]
    columns = dict.fromkeys(column for row in rows for column in row)
    last = ["differs", *differing, "note"]
    return pd.DataFrame(rows, columns=[*(column for column in columns if column not in last), *last])


def _row(run: ComparedRun, comparison: Comparison, differing: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.name}
    if not run.problem:
        _, metrics = run.scored()
        row |= {f"fold_{k}": value for k, value in zip(metrics.folds, metrics.fold_auc, strict=True)}
        row |= {"mean": metrics.mean, "sd": metrics.sd}
        row |= _columns("pooled", metrics.pooled) | _columns("ranked", metrics.ranked)
        row["interval_unit"] = metrics.pooled.unit
    if run.pooled:
        row |= _columns("difference", run.pooled) | {"p": run.pooled.corrected_p}
        for k, fold in zip(comparison.folds, run.folds, strict=True):
            row |= _columns(f"difference_{k}", fold) | {f"p_{k}": fold.corrected_p}
    is_reference = run is comparison.reference
    if run.pooled or is_reference:
        row["unit"] = comparison.unit
    row |= run.costs | {"differs": len(differing)} | {key: run.config.get(key) for key in differing}
    row["note"] = run.problem or run.unpaired_reason or (REFERENCES[comparison.family] if is_reference else "")
    return row


def _columns(name: str, estimate: Estimate) -> dict[str, Any]:
    reason = {f"undefined_{name}": estimate.undefined} if estimate.undefined else {}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high} | reason


def render_comparison(comparison: Comparison, form: str) -> str:
    """Return `comparison` as `text`, `md`, `csv` or `json`; only `csv` and `json` have all columns in full precision."""
    rows, sentences = comparison_table(comparison), conclusions(comparison)
    if form == "csv":
        return rows.to_csv(index=False)
    if form == "json":
        records = json.loads(rows.to_json(orient="records", double_precision=15))
        found = {"unit": comparison.unit, "family": comparison.family, "reference": comparison.reference.name}
        return _json(found | {"best": comparison.best, "runs": records, "words": sentences})
    by_fold = pd.DataFrame(
        {f"difference to {comparison.reference.name}": run.name}
        | {f"fold {k}": fold.text("+.4f") for k, fold in zip(comparison.folds, run.folds, strict=True)}
        for run in comparison.runs
        if run.pooled
    )
    return _render_tables([display_table(comparison), by_fold], [caption(comparison), *sentences], form)


def display_table(comparison: Comparison) -> pd.DataFrame:
    """Return the main columns of `comparison_table` as text, with intervals next to their values and "" for NaN."""
    rows, runs = comparison_table(comparison), {run.name: run for run in comparison.runs}
    ordered = [runs[name] for name in rows["run"]]
    shown = pd.DataFrame({"run": rows["run"]})
    for column in [column for column in rows if column.startswith("fold_")]:
        shown[column.replace("_", " ")] = _formatted(rows[column], ".4f")
    deviation = " ± " + _formatted(rows["sd"], ".4f")
    shown["mean ± SD"] = _formatted(rows["mean"], ".4f") + deviation.where(rows["sd"].notna(), "")
    shown["pooled"] = ["" if run.problem else run.scored()[1].pooled.text() for run in ordered]
    shown["ranked"] = _formatted(rows["ranked"], ".4f")
    shown["interval unit"] = rows["interval_unit"].fillna("")
    if "difference" in rows:
        differences = [run.pooled for run in ordered]
        shown["difference"] = ["" if each is None else each.text("+.4f") for each in differences]
        shown["p"] = ["" if each is None else _number(each.corrected_p, ".2g") for each in differences]
    for column, form in (("minutes", ".1f"), ("parameters", ",.0f"), ("images_per_second", ",.0f")):
        if column in rows:
            shown[column.replace("images_per_second", "images/s")] = _formatted(rows[column], form)
    columns = list(rows.columns)
    for column in columns[columns.index("differs") + 1 : columns.index("note")]:
        shown[column] = _formatted(rows[column], "")
    shown["note"] = rows["note"]
    return shown


def evaluation_table(result: EvaluationResult) -> pd.DataFrame:
    """Return one row per run as text: AUC of its models and of their mean, OOF AUC, drop, calibration error, difference."""
    rows = []
    for run in result.runs:
        areas, oof, difference = [*run.fold_auc.values()], [*run.oof_auc.values()], run.difference
        deviation = f" ± {np.std(areas, ddof=1):.4f}" if len(areas) > 1 else ""
        row = {
            "run": run.run,
            "models": str(len(areas)),
            "single model": f"{run.single:.4f}{deviation}",
            "mean of models": run.mean.text(),
            "OOF": f"{np.mean(oof):.4f}" if oof else "n/a",
            "drop": _number(run.drop, "+.4f"),
            "calibration error": _number(run.calibration_error, ".4f"),
            f"difference to {result.baseline}": "" if difference is None else difference.text("+.4f"),
            "p": "" if difference is None else _number(difference.corrected_p, ".2g"),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def evaluation_sentences(result: EvaluationResult) -> list[str]:
    """Return what the columns of `evaluation_table` are, and which runs may be the best, unless a baseline was named."""
    test = "DeLong" if result.unit == "patch" else "bootstrap over slides"
    caption = (
        f"{result.patches:,} patches, {result.positives / result.patches:.1%} with tumour. Single model: mean ± SD over the "
        f"models of the folds. OOF: mean over folds; drop: OOF minus single model. Intervals: 95 % ({test}, unit: "
        f"{result.unit})."
    )
    differences = {run.run: run.difference for run in result.runs if run.difference}
    if differences:
        caption += f" Differences are to {result.baseline}; their {FAMILIES[result.family]}."
    return [caption, describe_best(result.best, differences, result.baseline)] if result.best and differences else [caption]


def operating_table(predicted: Mapping[str, tuple[Labels, Floats]]) -> pd.DataFrame:
    """Return the operating points of each run as text, four rows each; `predicted` has labels and probabilities (n,) by run."""
    tables = {run: operating_points(*made) for run, made in predicted.items()}
    for run, (_, probabilities) in predicted.items():
        tables[run]["threshold"] = [_threshold(value, probabilities) for value in tables[run]["threshold"]]
    shown = pd.concat(tables, names=["run", "operating point"]).reset_index()
    forms = dict.fromkeys(["sensitivity", "specificity", "PPV", "F1"], ".4f")
    for column in shown.columns[3:]:
        shown[column] = [_number(value, forms.get(column, ",")) for value in shown[column]]
    return shown


def _threshold(value: float, probabilities: Floats) -> str:
    """Return `value` to 6 digits, or as many more as it takes to divide `probabilities` (n,) in the same way."""
    below = np.max(probabilities, where=probabilities < value, initial=-np.inf)
    texts = (f"{value:.{digits}g}" for digits in range(6, 18))
    return next(text for text in texts if below < float(text) <= value)


def render_evaluation(result: EvaluationResult, form: str) -> str:
    """Return `result` as `text`, `md`, `csv` or `json`; only `csv` and `json` have full precision."""
    content = result.model_dump(mode="json")
    if form == "json":
        return _json(content)
    if form == "csv":
        shared = {key: content[key] for key in ("name", "patches", "positives", "unit", "baseline", "family")}
        rows = [shared | {key: value for key, value in run.items() if value is not None} for run in content["runs"]]
        return pd.json_normalize(rows).to_csv(index=False)
    return f"{result.name}:\n\n" + _render_tables([evaluation_table(result)], evaluation_sentences(result), form)


def _render_tables(tables: list[pd.DataFrame], sentences: list[str], form: str) -> str:
    """Return the tables that have rows, as `text` or `md`, followed by `sentences`, the first of which is a caption."""
    shown = [_markdown(table) if form == "md" else f"{table.to_string(index=False)}\n" for table in tables if len(table)]
    if form == "md":
        sentences = [f"{sentences[0]}\n", *(f"- {sentence}" for sentence in sentences[1:])]
    return "\n".join([*shown, "\n".join(sentences)]) + "\n"


def _markdown(shown: pd.DataFrame) -> str:
    lines = [shown.columns.tolist(), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None or np.isnan(value) else f"{value:{form}}"


def _formatted(values: pd.Series, form: str) -> pd.Series:
    texts = ["" if pd.isna(value) else format(value, form) for value in values]
    return pd.Series(texts, values.index, dtype=object)
