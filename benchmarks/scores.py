"""Scores of experiments and of trials that change them: records finished runs, writes the tables of SCORES.md.

`python -m benchmarks.scores [RUN] [--base RECORDED] [--change TEXT]` adds a run of this workspace, or replaces its record. Its
folds must be predicted, and `evaluate RUN --folds 0 --name held_out` must have scored it on the held-out slides, unless its
folds are by stain. scores/records.json has the cost and the scores of every row; the page needs nothing else. scores/oof.npz
and scores/held_out.npz have the probabilities (float32) of rows that others are compared with.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.results import markdown, replace_block
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import BASELINE, EXPERIMENTS
from pcam_kaggle.core.files import write
from pcam_kaggle.core.paths import find_workspace
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.intervals import PATCHES, Clusters, interval, joint_aucs, simultaneous_differences, unit_of
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.scoring.results import Estimate

PAGE = Path(__file__).parent / "SCORES.md"
FOLDER = PAGE.parent / "scores"
RECORDS = FOLDER / "records.json"
ID_LENGTH = 16
BY_LABEL, BY_STAIN = "stratified_5_42", "stain_5_42"
# Columns (uint8) beside those of the rows: label, fold under each scheme, and group of similar stain.
TABLES = {"oof": ("label", BY_LABEL, BY_STAIN, "stain_group"), "held_out": ("label",)}
SPEEDS = ("train_images_per_second", "predict_images_per_second")
DECIMALS = 8
BLEND = "blend"
Records = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Scored:
    """What is recorded.

    Attributes:
        records: Cost, config, `base`, `change` and `scores` of each row, and `table`, the table of the page that lists it. The
            `change` may be one that the package no longer has a field for.
        oof: By the first 16 digits of the id: label, fold and group, and the OOF probabilities of each row, NaN where it
            predicts no patch.
        held_out: The same for the patches of held-out slides: label, and a column per row, by its model of fold 0.
    """

    records: Records
    oof: pd.DataFrame
    held_out: pd.DataFrame

    @classmethod
    def load(cls) -> "Scored":
        return cls(json.loads(RECORDS.read_text()), *(_read(name) for name in TABLES))

    def save(self) -> None:
        """Write the records, one line each, and both tables."""
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(self.records[name])}" for name in sorted(self.records))
        write(RECORDS, lambda file: file.write(f"{{\n{lines}\n}}\n".encode()))
        for name, facts in TABLES.items():
            table = getattr(self, name)
            arrays: dict[str, Any] = {"id": table.index.to_numpy(f"S{ID_LENGTH}")}
            arrays |= {fact: table[fact].to_numpy(np.uint8) for fact in facts}
            arrays |= {row: table[row].to_numpy(np.float32) for row in table.columns.drop([*facts, BLEND])}
            write(FOLDER / f"{name}.npz", lambda out, arrays=arrays: np.savez_compressed(out, **arrays))


def _read(name: str) -> pd.DataFrame:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        columns = {key: arrays[key].astype(np.uint8 if key in TABLES[name] else np.float64) for key in arrays if key != "id"}
        return pd.DataFrame(columns, index=arrays["id"].astype(str))


def harvest(scored: Scored, name: str, base: str | None, change: str | None) -> None:
    """Add the cost of the finished run `name` and its probabilities to `scored`.

    Raises:
        UserError: It is not finished or predicts other patches, or it is new and `base` or `change` is missing.
    """
    workspace = find_workspace(os.environ.get("PCAM_WORK"))
    run = Run(workspace.run(name))
    made, old = run.made_from(), scored.records.get(name, {})
    base, change = base or old.get("base"), change or old.get("change")
    folds = [fold for fold in run.folds() if fold.has_predictions]
    if not (base and change and folds and made.folds in scored.oof):
        raise UserError(f"{name}: predict {BY_LABEL} or {BY_STAIN}, and pass --base and --change for a run without a record")
    metrics, session = [fold.metrics() for fold in folds], run.environments()[-1]
    rates = [fold.predictions_record().images_per_second for fold in folds]
    by_stain = made.folds == BY_STAIN
    table = "experiments" if name in EXPERIMENTS else "seeds" if "-seed" in name else "trials"
    scored.records[name] = {
        "parameters": metrics[0].parameters,
        "macs": metrics[0].macs,
        "train_images_per_second": round(float(np.median([fold.images_per_second for fold in metrics])), 1),
        "predict_images_per_second": round(float(np.median(rates)), 1),
        "minutes": round(sum(fold.seconds for fold in metrics) / 60, 1),
        "config": {key: value for key, value in made.config.items() if value != getattr(Config(), key, None)},
        "base": base,
        "change": change,
        "backend": f"{session.device}, {session.backend.precision}",
        "commit": session.commit,
        "table": "stain" if by_stain else table,
    }
    wanted = scored.oof[made.folds].isin([fold.number for fold in folds])
    _add_column(scored.oof, name, pd.concat([fold.predictions()[0] for fold in folds]), "probability", wanted)
    if not by_stain:
        evaluated = read_numbers(workspace.evaluations / "held_out" / "predictions" / f"{name}.csv", ["fold_0"])
        _add_column(scored.held_out, name, evaluated, "fold_0", scored.held_out["label"].notna())


def _add_column(table: pd.DataFrame, name: str, predicted: pd.DataFrame, column: str, wanted: pd.Series) -> None:
    """Add the `column` of `predicted` to `table`, for the `wanted` patches of it."""
    found = predicted.set_index(predicted["id"].str[:ID_LENGTH])[column]
    if set(found.index) != set(table.index[wanted]):
        raise UserError(f"{name}: predicts other patches than those recorded in scores/; use the same data and folds")
    table[name] = found.reindex(table.index)


def add_blend(scored: Scored) -> None:
    """Add the experiment that blends others: the mean of their probabilities, the sum of their costs."""
    members = list(EXPERIMENTS[BLEND].members)
    made = [scored.records[member] for member in members]
    folds = [scored.oof.loc[scored.oof[member].notna(), BY_LABEL].nunique() for member in members]
    scored.records[BLEND] = {
        **{key: sum(each[key] for each in made) for key in ("parameters", "macs")},
        "minutes": min(folds) * sum(each["minutes"] / count for each, count in zip(made, folds, strict=True)),
        **{key: 1 / sum(1 / each[key] for each in made) for key in SPEEDS},
        "base": BASELINE,
        "change": f"mean of {', '.join(members)}",
        "table": "experiments",
    }
    for table in (scored.oof, scored.held_out):
        table[BLEND] = table[members].mean(axis=1, skipna=False)


def score(scored: Scored, name: str, scheme: str) -> dict[str, Any]:
    """Return the AUC and its interval of `name` for `oof`, `fold_0` of it and `held_out`, and the difference to its base.

    The unit of resampling is what the folds keep together: patches, or groups of similar stain.
    """
    oof, base, found = scored.oof.dropna(subset=name), scored.records[name]["base"], {}
    for key, table in {"oof": oof, "fold_0": oof[oof[scheme] == 0], "held_out": scored.held_out}.items():
        if name in table:
            unit, labels = unit_of(scheme), table["label"].to_numpy(int)
            clusters = PATCHES if unit == "patch" else Clusters(unit, table["stain_group"].to_numpy(np.int64))
            found[key] = _with_interval(interval(labels, table[name].to_numpy(), clusters))
            if base != name and base in table and table[base].notna().all():
                joint = joint_aucs(labels, table[[name, base]].to_numpy().T, clusters)
                made = simultaneous_differences(joint, [(0, 1)])[0]
                found[f"{key}_difference"] = _with_interval(made)
    folds = [auc(part["label"].to_numpy(int), part[name].to_numpy()) for _, part in oof.groupby(scheme)]
    return {**found, "folds": _rounded(folds)}


def _with_interval(estimate: Estimate) -> list[float]:
    return _rounded([estimate.value, estimate.low, estimate.high])


def _rounded(values: Any) -> list[float]:
    return [round(float(value), DECIMALS) for value in values]


def _text(values: list[float] | None, sign: str = "") -> str:
    """Return a value with its interval, nothing without a value."""
    return f"{{:{sign}.4f}} [{{:{sign}.4f}}, {{:{sign}.4f}}]".format(*values) if values else ""


def experiments_table(records: Records) -> str:
    lines = []
    for name, record in _listed(records, "experiments", "held_out"):
        scores, folds = record["scores"], len(record["scores"]["folds"])
        rows = [name, *(row for row in records if row.startswith(f"{name}-seed"))]
        seeds = [records[row]["scores"]["held_out"][0] for row in rows]
        spread = f"{np.mean(seeds):.4f} ± {np.std(seeds, ddof=1):.4f} ({len(seeds)})" if len(seeds) > 1 else ""
        oof = _text(scores["oof"]) + (" (fold 0)" if folds == 1 else "")
        values = (
            _text(scores["held_out"]),
            spread,
            _text(scores.get("held_out_difference"), "+"),
            oof,
            _text(scores.get("oof_difference"), "+"),
        )
        speeds = ", ".join(f"{record[key]:.0f}" for key in SPEEDS)
        lines.append((f"`{name}`", *values, f"{record['parameters']:,}", speeds, f"{record['minutes'] / folds:.1f}"))
    scored = ("held-out slides", "mean ± SD (seeds)", f"difference to `{BASELINE}`", "OOF", f"difference to `{BASELINE}`")
    return markdown(("experiment", *scored, "parameters", "images/s", "minutes per fold"), lines)


def trials_table(records: Records) -> str:
    lines = []
    for _, record in _listed(records, "trials", "held_out_difference"):
        scores = record["scores"]
        values = (_text(scores["held_out_difference"], "+"), f"{scores['fold_0_difference'][0]:+.4f}")
        lines.append((record["change"], f"`{record['base']}`", f"{scores['held_out'][0]:.4f}", *values))
    return markdown(("change", "in", "held-out slides", "difference", "OOF, difference"), lines)


def stain_table(records: Records) -> str:
    lines = [
        (f"`{name}`", record["change"], _text(record["scores"]["oof"]), _text(record["scores"].get("oof_difference"), "+"))
        for name, record in _listed(records, "stain", "oof")
    ]
    return markdown(("run", "change", "OOF of two folds", "difference"), lines)


def _listed(records: Records, table: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows that `table` lists, those with the highest score `key` first."""
    listed = [(name, record) for name, record in records.items() if record.get("table") == table]
    return sorted(listed, key=lambda row: row[1]["scores"][key][0], reverse=True)


def main(name: str | None, base: str | None, change: str | None) -> None:
    """Record the run `name`, if any, as in `harvest`; score all rows that have probabilities, and write SCORES.md."""
    scored = Scored.load()
    if name:
        harvest(scored, name, base, change)
    add_blend(scored)
    for row in scored.oof.columns.drop([*TABLES["oof"]]):
        record = scored.records[row]
        record["scores"] = score(scored, row, BY_STAIN if record.get("table") == "stain" else BY_LABEL)
    scored.save()
    for block, table in (("experiments", experiments_table), ("trials", trials_table), ("stain", stain_table)):
        replace_block(PAGE, block, table(scored.records))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", metavar="RUN")
    parser.add_argument("--base", help="the row that it is compared with")
    parser.add_argument("--change", help="what it changes in the base")
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(f"error: {error}")
