"""Out-of-fold scores of every experiment and trial: trains what has no record, writes the tables of SCORES.md.

`python -m benchmarks.scores [NAME …]`, with PCAM_DATA naming the competition's folder. The cost of a row is recorded in
scores/records.json, its out-of-fold probabilities in scores/oof.npz (float32, NaN where the row predicts no patch). All scores
are computed from these two files, without training.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.results import markdown, replace_block
from pcam_kaggle import UserError
from pcam_kaggle.cli.main import main as run_command
from pcam_kaggle.config.experiments import BASELINE, QUICK, experiment
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import read_json, write
from pcam_kaggle.data.csv_io import read_numbers
from pcam_kaggle.data.layout import find_data, find_workspace
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.scoring.resampling import interval, paired_test, unit_of

HERE = Path(__file__).parent
PAGE = HERE / "SCORES.md"
RECORDS = HERE / "scores" / "records.json"
OOF = HERE / "scores" / "oof.npz"
ID_LENGTH = 16
# Columns (uint8) beside those of the rows: label, fold under each scheme, and group of similar stain.
FACTS = ("label", "stratified_5_42", "stain_5_42", "stain_group")
SPEEDS = ("train_images_per_second", "predict_images_per_second")
ALL, PART = (0, 1, 2, 3, 4), (0, 1)
Records = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """A run to score: an experiment with `changes` to its config, on `folds`, compared with the row called `base`."""

    experiment: str
    base: str
    changes: tuple[str, ...] = ()
    folds: tuple[int, ...] = ALL

    @property
    def name(self) -> str:
        return "-".join([self.experiment, *(change.removeprefix("groups=").replace("=", "_") for change in self.changes)])

    @property
    def scheme(self) -> str:
        return "stain_5_42" if "groups=stain" in self.changes else "stratified_5_42"

    @property
    def members(self) -> tuple[str, ...]:
        return experiment(self.experiment).members


NAMES = (BASELINE, QUICK, "bottleneck", "bottleneck_d4", "two_stream", "lite0", "lite0_stain", "lite0_again", "blend")
NAMED = (
    *(Row(name, BASELINE) for name in NAMES),
    *(Row("bottleneck", BASELINE, changes) for changes in (("tta=1",), ("epochs=10",), ("epochs=10", "tta=1"))),
)
TRIED = ("groups=stain", "lr=0.002")
TRIAL_BASE = Row(QUICK, f"{QUICK}-stain-lr_0.002", TRIED, PART)
STAIN = tuple(Row(name, TRIAL_BASE.name, ("groups=stain",), PART) for name in (QUICK, "two_stream", "lite0", BASELINE))
TRIALS = tuple(
    Row(QUICK, TRIAL_BASE.name, (*TRIED, change), PART)
    for change in (
        *("optimizer=adamw", "epochs=10", "stain_jitter=0.15", "stain_mix=0.5", "degrade=0.3", "mixup=0.2", "norm=test"),
        f"teacher={TRIAL_BASE.name}",
    )
)
ROWS = {row.name: row for row in (*NAMED, *STAIN, TRIAL_BASE, *TRIALS)}


def load() -> tuple[Records, pd.DataFrame]:
    """Return the records, and a table by the first 16 digits of the id: `FACTS`, and a column of probabilities per row."""
    with np.load(OOF) as arrays:
        table = pd.DataFrame({name: arrays[name] for name in FACTS}, index=arrays["id"].astype(str))
        for name in set(arrays.files) - {"id", *FACTS}:
            table[name] = arrays[name].astype(np.float64)
    return json.loads(RECORDS.read_text()), table


def save(records: Records, table: pd.DataFrame) -> None:
    """Store `records`, one line each, and the `table` that `load` returns."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(records[name])}" for name in sorted(records))
    write(RECORDS, lambda file: file.write(f"{{\n{lines}\n}}\n".encode()))
    arrays: dict[str, Any] = {"id": table.index.to_numpy(f"S{ID_LENGTH}")}
    arrays |= {name: table[name].to_numpy(np.uint8) for name in FACTS}
    arrays |= {name: table[name].to_numpy(np.float32) for name in sorted(records)}
    write(OOF, lambda file: np.savez_compressed(file, **arrays))


def make(row: Row) -> None:
    """Run the stages of `row` that are not finished.

    Raises:
        UserError: If there is no data, or a stage fails; the stage prints the reason.
    """
    if find_data(os.environ.get("PCAM_DATA"), find_workspace(None).root) is None:
        raise UserError(f"{row.name}: has no record, and training it needs the competition's patches; set PCAM_DATA")
    options = ["-e", row.experiment, "--name", row.name, *(part for change in row.changes for part in ("--set", change))]
    folds = ["--folds", ",".join(map(str, row.folds))]
    for stage in (["prepare"], ["folds"], ["train", *folds], ["predict", *folds]):
        if run_command([*stage, *options]):
            raise UserError(f"{row.name}: not scored, because {stage[0]} failed")


def harvest(row: Row, records: Records, table: pd.DataFrame) -> None:
    """Add the record of the finished run of `row` to `records`, and its probabilities to `table`."""
    run = find_workspace(None).run(row.name)
    found = pd.concat([read_numbers(run / f"fold_{fold}" / "oof.csv", ["probability"]) for fold in row.folds])
    column = found.set_index(found["id"].str[:ID_LENGTH])["probability"]
    if set(column.index) != set(table.index[table[row.scheme].isin(row.folds)]):
        raise UserError(f"{run}: predicts other patches than the folds {row.scheme} of scores/oof.npz; use the same data set")
    metrics = [read_json(run / f"fold_{fold}" / "metrics.json") for fold in row.folds]
    predictions = [read_json(run / f"fold_{fold}" / "predictions.json") for fold in row.folds]
    made, defaults = Run(run).environments()[-1], dataclasses.asdict(Config())
    config = dataclasses.asdict(experiment(row.experiment).config.changed(list(row.changes)))
    records[row.name] = {
        "parameters": metrics[0]["parameters"],
        "macs": metrics[0]["macs"],
        **{
            key: round(float(np.median([fold["images_per_second"] for fold in part])), 1)
            for key, part in zip(SPEEDS, (metrics, predictions), strict=True)
        },
        "minutes": round(sum(fold["seconds"] for fold in metrics) / 60, 1),
        "config": {key: value for key, value in config.items() if value != defaults[key]},
        "backend": f"{made['device']}, {made['backend']['precision']}",
        "commit": made["commit"],
    }
    table[row.name] = column.reindex(table.index)


def blended(records: Records, table: pd.DataFrame) -> tuple[Records, pd.DataFrame]:
    """Return both with the rows that blend others: the mean of their probabilities, the sum of their costs."""
    records, table = dict(records), table.copy()
    for row in (row for row in NAMED if row.members and all(name in records for name in row.members)):
        made = [records[name] for name in row.members]
        records[row.name] = {
            **{key: sum(each[key] for each in made) for key in ("parameters", "macs", "minutes")},
            **{key: 1 / sum(1 / each[key] for each in made) for key in SPEEDS},
        }
        table[row.name] = table[list(row.members)].mean(axis=1)
    return records, table


def score(row: Row, table: pd.DataFrame) -> dict[str, Any]:
    """Return the AUC of `row` per fold and pooled, and its paired difference from its base.

    What is resampled is what the folds keep together: patches, or groups of similar stain.
    """
    known = table.dropna(subset=row.name)
    unit = unit_of(row.scheme)
    labels, values = known["label"].to_numpy(int), known[row.name].to_numpy()
    groups = None if unit == "patch" else known["stain_group"].to_numpy()
    pooled = interval(labels, values, groups, unit)
    scored: dict[str, Any] = {
        "folds": [auc(part["label"].to_numpy(int), part[row.name].to_numpy()) for _, part in known.groupby(row.scheme)],
        "pooled": pooled[:3],
    }
    if row.base != row.name and row.base in known:
        scored["difference"] = paired_test(labels, known[row.base].to_numpy(), groups, unit)(values)[:3]
    return scored


def score_table(rows: tuple[Row, ...], records: Records, table: pd.DataFrame) -> str:
    """Return a Markdown table of those of `rows` that have records, highest pooled AUC first."""
    scores = {row: score(row, table) for row in rows if row.name in records}
    lines = []
    for row, scored in sorted(scores.items(), key=lambda item: -item[1]["pooled"][0]):
        record = records[row.name]
        config = " ".join(f"{key}={value}" for key, value in record.get("config", {}).items())
        lines.append(
            (
                f"`{row.name}`",
                "{:.4f} [{:.4f}, {:.4f}]".format(*scored["pooled"]),
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(*scored["difference"]) if "difference" in scored else "",
                " ".join(f"{value:.4f}" for value in scored["folds"]),
                f"{record['parameters']:,}",
                f"{record['macs'] / 1e6:.0f} M",
                ", ".join(f"{record[key]:.0f}" for key in SPEEDS),
                f"{record['minutes']:.1f}",
                " ".join(row.changes) or " + ".join(row.members) or config,
            )
        )
    head = ("run", "pooled, 95 % interval", "minus base", "folds", "parameters", "MACs", "images/s", "minutes", "config")
    return markdown(head, lines)


def stain_table(records: Records, table: pd.DataFrame) -> str:
    """Return a Markdown table of the mean AUC of folds 0 and 1, stratified by label and grouped by stain."""
    lines = []
    for row in (row for row in STAIN if row.name in records and row.experiment in records):
        label, stain = (float(np.mean(score(ROWS[name], table)["folds"][:2])) for name in (row.experiment, row.name))
        lines.append((f"`{row.experiment}`", f"{label:.4f}", f"{stain:.4f}", f"{label - stain:.4f}"))
    return markdown(("experiment", "folds by label", "folds by stain", "difference"), lines)


def write_page(records: Records, table: pd.DataFrame) -> None:
    """Write the tables of SCORES.md."""
    records, table = blended(records, table)
    replace_block(PAGE, "experiments", score_table(NAMED, records, table))
    replace_block(PAGE, "trials", score_table((TRIAL_BASE, STAIN[0], *TRIALS), records, table))
    replace_block(PAGE, "stain", stain_table(records, table))


def main(names: list[str]) -> None:
    """Train and record the rows called `names`, or all without a record, one after the other, then write SCORES.md.

    Raises:
        UserError: If a name is not one of a row, or training fails as in `make`.
    """
    if unknown := set(names) - set(ROWS):
        raise UserError(f"{', '.join(sorted(unknown))}: no such row; choose from {', '.join(ROWS)}")
    records, table = load()
    for row in (ROWS[name] for name in names or [name for name in ROWS if name not in records]):
        if not row.members:
            make(row)
            harvest(row, records, table)
            save(records, table)
    write_page(records, table)
    print(PAGE.read_text())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
