"""Scores of every experiment and trial: trains what has no record, writes the tables of SCORES.md.

`python -m benchmarks.scores [NAME …]`, with PCAM_DATA naming the competition's folder, and PCAM_UNSEEN a folder with `patches/`
and `labels.csv` of other slides. The cost of a row is recorded in scores/records.json, its out-of-fold probabilities in
scores/oof.npz (float32, NaN where the row predicts no patch), and those of its net of fold 0 for the patches of other slides in
scores/unseen.npz. All scores are computed from these files, without training.
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
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.results import markdown, replace_block
from pcam_kaggle.cli.main import main as run_command
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import BASELINE, PROBE, QUICK, experiment
from pcam_kaggle.core.files import write
from pcam_kaggle.core.paths import Workspace, find_data, find_workspace
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.evaluation import UNCHANGED
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import Unit, auc
from pcam_kaggle.scoring.resampling import interval, paired_test, unit_of

HERE = Path(__file__).parent
PAGE = HERE / "SCORES.md"
RECORDS = HERE / "scores" / "records.json"
OOF = HERE / "scores" / "oof.npz"
UNSEEN = HERE / "scores" / "unseen.npz"
ID_LENGTH = 16
# Columns (uint8) beside those of the rows: label, fold under each scheme, and group of similar stain.
BY_LABEL, BY_STAIN = "stratified_5_42", "stain_5_42"
FACTS = ("label", BY_LABEL, BY_STAIN, "stain_group")
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
        # The records name probes as the package did when they were scored.
        changes = [change.removeprefix("groups=").replace("probe=true", "optimizer=logistic") for change in self.changes]
        return "-".join([self.experiment, *changes]).replace("=", "_")

    @property
    def scheme(self) -> str:
        return BY_STAIN if "groups=stain" in self.changes else BY_LABEL

    @property
    def members(self) -> tuple[str, ...]:
        return experiment(self.experiment).members


PROBED = Row("lite0", "lite0", PROBE)
NAMED = (
    *(Row(name, BASELINE) for name in (BASELINE, QUICK, "bottleneck", "lite0", "lite0-seed43", "pretrained", "blend")),
    Row("bottleneck_d4", BASELINE, folds=(0,)),
    Row(QUICK, QUICK, ("precision=fp32",), (0,)),
    Row("lite0", "lite0", ("resize=144",), (0,)),
    Row("lite0", "lite0", ("resize=192",), (0,)),
    Row("lite0", "lite0", ("layer_decay=0.95", "lr=0.002"), (0,)),
    Row("lite0", "lite0-resize_144", ("resize=144", "freeze=0.5"), (0,)),
    *(
        Row("lite0", "lite0-resize_144", ("resize=144", *changes), (0,))
        for changes in (("pool=gem",), ("pool=catavgmax",), ("layer_decay=0.9", "lr=0.003"))
    ),
    PROBED,
    Row("lite0", PROBED.name, (*PROBE, "pool=catavgmax")),
    Row("lite0", PROBED.name, ("resize=224", *PROBE)),
)
STAIN = tuple(Row(name, f"{BASELINE}-stain", ("groups=stain",), PART) for name in (BASELINE, "bottleneck"))
ROWS = {row.name: row for row in (*NAMED, *STAIN)}


@dataclass(frozen=True, slots=True)
class Scored:
    """What is recorded.

    Attributes:
        records: Cost, config, `base` and `change` of each row, and `prediction`, its batch norm statistics and views. The
            `change` of a row that is not in `ROWS` may be one that the package no longer has a field for. `by_stain` names the
            row of the same config on folds by stain.
        oof: By the first 16 digits of the id: `FACTS`, and a column of probabilities per row.
        unseen: The same for the patches of other slides: `label`, and a column per row, by its net of fold 0.
    """

    records: Records
    oof: pd.DataFrame
    unseen: pd.DataFrame


def load() -> Scored:
    """Return the records and both tables."""
    return Scored(json.loads(RECORDS.read_text()), _read_table(OOF, FACTS), _read_table(UNSEEN, ("label",)))


def save(scored: Scored) -> None:
    """Store the records, one line each, and both tables."""
    records = scored.records
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(records[name])}" for name in sorted(records))
    write(RECORDS, lambda file: file.write(f"{{\n{lines}\n}}\n".encode()))
    _write_table(OOF, scored.oof, FACTS)
    _write_table(UNSEEN, scored.unseen, ("label",))


def _read_table(file: Path, facts: tuple[str, ...]) -> pd.DataFrame:
    with np.load(file) as arrays:
        columns = {
            name: arrays[name].astype(np.uint8 if name in facts else np.float64) for name in arrays.files if name != "id"
        }
        return pd.DataFrame(columns, index=arrays["id"].astype(str))


def _write_table(file: Path, table: pd.DataFrame, facts: tuple[str, ...]) -> None:
    arrays: dict[str, Any] = {"id": table.index.to_numpy(f"S{ID_LENGTH}")}
    arrays |= {name: table[name].to_numpy(np.uint8) for name in facts}
    arrays |= {name: table[name].to_numpy(np.float32) for name in sorted(set(table) - set(facts))}
    write(file, lambda out: np.savez_compressed(out, **arrays))


def make(row: Row) -> None:
    """Run the stages of `row` that are not finished.

    Raises:
        UserError: If there are no data, or a stage fails; the stage prints the reason.
    """
    if find_data(os.environ.get("PCAM_DATA"), _workspace().root) is None or not os.environ.get("PCAM_UNSEEN"):
        raise UserError(f"{row.name}: has no record, and training it needs patches; set PCAM_DATA and PCAM_UNSEEN")
    options = ["-e", row.experiment, "--name", row.name, *(part for change in row.changes for part in ("--set", change))]
    folds = ["--folds", ",".join(map(str, row.folds))]
    unseen = Path(os.environ["PCAM_UNSEEN"])
    patches = ["--patches", str(unseen / "patches"), "--labels", str(unseen / "labels.csv"), "--name", "unseen"]
    stages = [[*stage, *options] for stage in (["prepare"], ["folds"], ["train", *folds], ["predict", *folds])]
    if row.scheme == BY_LABEL:
        stages.append(["evaluate", row.name, "--folds", "0", *patches])
    for stage in stages:
        if run_command(stage):
            raise UserError(f"{row.name}: not scored, because {stage[0]} failed")


def _workspace() -> Workspace:
    return find_workspace(os.environ.get("PCAM_WORK"))


def harvest(row: Row, scored: Scored) -> None:
    """Add the record of the finished run of `row` and its probabilities to `scored`."""
    run = Run(_workspace().run(row.name))
    parts = [run.fold(number) for number in row.folds]
    found = pd.concat([fold.predictions()[0] for fold in parts])
    column = found.set_index(found["id"].str[:ID_LENGTH])["probability"]
    if set(column.index) != set(scored.oof.index[scored.oof[row.scheme].isin(row.folds)]):
        raise UserError(
            f"{run.folder}: predicts other patches than the folds {row.scheme} of scores/oof.npz; use the same data set"
        )
    metrics = [fold.metrics() for fold in parts]
    made, defaults = run.environments()[-1], dataclasses.asdict(Config())
    config = dataclasses.asdict(experiment(row.experiment).config.changed(list(row.changes)))
    scored.records[row.name] = {
        "parameters": metrics[0]["parameters"],
        "macs": metrics[0]["macs"],
        "train_images_per_second": round(float(np.median([fold["images_per_second"] for fold in metrics])), 1),
        "predict_images_per_second": round(float(np.median([fold.prediction_rate() for fold in parts])), 1),
        "minutes": round(sum(fold["seconds"] for fold in metrics) / 60, 1),
        "config": {key: value for key, value in config.items() if value != defaults[key]},
        "base": row.base,
        "change": " ".join(f"`{change}`" for change in row.changes) or "named experiment",
        "prediction": f"{config['norm']}, {config['tta']}" + (f" ± {config['tta_shift']} px" if config["tta_shift"] else ""),
        "backend": f"{made['device']}, {made['backend']['precision']}",
        "commit": made["commit"],
    }
    scored.oof[row.name] = column.reindex(scored.oof.index)
    if row.scheme == BY_LABEL:
        scored.records[row.name]["by_stain"] = dataclasses.replace(row, changes=("groups=stain", *row.changes)).name
        file = _workspace().evaluations / "unseen" / UNCHANGED / f"{row.name}.csv"
        table = read_numbers(file, ["fold_0"])
        column = table.set_index(table["id"].str[:ID_LENGTH])["fold_0"]
        if set(column.index) != set(scored.unseen.index):
            raise UserError(f"{file}: holds other patches than scores/unseen.npz; use the same set")
        scored.unseen[row.name] = column.reindex(scored.unseen.index)


def blended(scored: Scored) -> Scored:
    """Return `scored` with the rows that blend others: the mean of their probabilities, the sum of their costs."""
    records, oof, unseen = dict(scored.records), scored.oof.copy(), scored.unseen.copy()
    for row in (row for row in NAMED if row.members and all(name in records for name in row.members)):
        made, members = [records[name] for name in row.members], list(row.members)
        counts = [oof.dropna(subset=name)[BY_LABEL].nunique() for name in members]
        records[row.name] = {
            **{key: sum(each[key] for each in made) for key in ("parameters", "macs")},
            # Of the folds that all members have.
            "minutes": min(counts) * sum(each["minutes"] / count for each, count in zip(made, counts, strict=True)),
            **{key: 1 / sum(1 / each[key] for each in made) for key in SPEEDS},
            "base": row.base,
            "change": f"mean of {', '.join(members)}",
        }
        oof[row.name] = oof[members].mean(axis=1, skipna=False)
        if all(name in unseen for name in members):
            unseen[row.name] = unseen[members].mean(axis=1, skipna=False)
    return Scored(records, oof, unseen)


def score_table(scored: Scored, scheme: str, count: int) -> str:
    """Return a Markdown table of the rows that predict `count` folds of `scheme` out of fold, highest pooled AUC first."""
    lines = []
    for name in _rows(scored, scheme, count):
        table, record = scored.oof.dropna(subset=name), scored.records[name]
        areas = [auc(part["label"].to_numpy(int), part[name].to_numpy()) for _, part in table.groupby(scheme)]
        pooled = _interval(table, name, scheme)
        line = (
            f"`{name}`",
            "{:.4f} [{:.4f}, {:.4f}]".format(*pooled),
            _minus_base(scored, table, name, scheme),
            " ".join(f"{area:.4f}" for area in areas),
            f"{record['parameters']:,}",
            f"{record['macs'] / 1e6:.0f} M",
            ", ".join(f"{record[key]:.0f}" for key in SPEEDS),
            f"{record['minutes']:.1f}",
            record["change"],
        )
        lines.append((pooled[0], line))
    head = ("run", "pooled, 95 % interval", "minus base", "folds", "parameters", "MACs", "images/s", "minutes", "change")
    return markdown(head, [line for _, line in sorted(lines, reverse=True)])


def unseen_table(scored: Scored) -> str:
    """Return a Markdown table of all rows with a score on other slides, best first: that score beside both kinds of OOF."""
    lines = []
    for name in scored.unseen.columns.drop("label"):
        record, fold = scored.records[name], _fold_0(scored)
        area, low, high = _interval(scored.unseen, name, BY_LABEL)
        stain = _stain(scored, name)
        line = (
            f"`{name}`",
            f"{area:.4f} [{low:.4f}, {high:.4f}]",
            _minus_base(scored, scored.unseen, name, BY_LABEL),
            f"{_area(fold, name):.4f}",
            _minus_base(scored, fold, name, BY_LABEL),
            "" if stain is None else f"{stain:.4f}",
            f"{record['parameters']:,}",
            f"{record['minutes'] / scored.oof.dropna(subset=name)[BY_LABEL].nunique():.1f}",
            record.get("prediction", ""),
            record["change"],
        )
        lines.append((area, line))
    head = (
        *("run", "other slides, 95 % interval", "minus base", "OOF", "minus base", "OOF by stain", "parameters", "minutes"),
        *("norm, views", "change"),
    )
    return markdown(head, [line for _, line in sorted(lines, reverse=True)])


def correlation_text(scored: Scored) -> str:
    """Return how each kind of OOF AUC orders the rows, compared with their AUC on other slides."""
    names, fold = list(scored.unseen.columns.drop("label")), _fold_0(scored)
    parts = []
    for kind, areas in (
        ("folds by label", {name: _area(fold, name) for name in names}),
        ("folds by stain", {name: area for name in names if (area := _stain(scored, name)) is not None}),
    ):
        rank = spearmanr([*areas.values()], [_area(scored.unseen, name) for name in areas]).statistic
        parts.append(f"{rank:.2f} for {kind} ({len(areas)} rows)")
    return f"Spearman's rank correlation of OOF AUC on fold 0 with the AUC on other slides: {', '.join(parts)}."


def _rows(scored: Scored, scheme: str, count: int) -> list[str]:
    """Return the rows of `scheme` with predictions for exactly `count` whole folds of it."""

    def predicts(name: str) -> bool:
        known = scored.oof[name].notna()
        return scored.oof.loc[known, scheme].nunique() == count and known.equals(
            scored.oof[scheme].isin(scored.oof.loc[known, scheme].unique())
        )

    return [name for name in scored.oof.columns.drop(list(FACTS)) if predicts(name)]


def _fold_0(scored: Scored) -> pd.DataFrame:
    return scored.oof[scored.oof[BY_LABEL] == 0]


def _area(table: pd.DataFrame, name: str) -> float:
    return auc(table["label"].to_numpy(int), table[name].to_numpy())


def _stain(scored: Scored, name: str) -> float | None:
    """Return the AUC on fold 0 of the folds by stain of the row with the config of `name`; None if there is none."""
    twin = scored.records[name].get("by_stain", "")
    return _area(scored.oof[scored.oof[BY_STAIN] == 0], twin) if twin in scored.oof else None


def _groups(table: pd.DataFrame, scheme: str) -> tuple[NDArray[np.int64] | None, Unit]:
    """Return what is resampled under `scheme`, which is what the folds keep together, and its unit."""
    unit = unit_of(scheme)
    return (None if unit == "patch" else table["stain_group"].to_numpy(np.int64)), unit


def _interval(table: pd.DataFrame, name: str, scheme: str) -> tuple[float, float, float]:
    return interval(table["label"].to_numpy(int), table[name].to_numpy(), *_groups(table, scheme))[:3]


def _minus_base(scored: Scored, table: pd.DataFrame, name: str, scheme: str) -> str:
    """Return the difference of `name` from its base on the patches in `table`, with its interval; empty without a base."""
    base = scored.records[name]["base"]
    if base == name or base not in table or table[base].isna().any():
        return ""
    test = paired_test(table["label"].to_numpy(int), table[base].to_numpy(), *_groups(table, scheme))
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*test(table[name].to_numpy())[:3])


def write_page(scored: Scored) -> None:
    """Write the tables of SCORES.md."""
    scored = blended(scored)
    replace_block(PAGE, "unseen", unseen_table(scored))
    replace_block(PAGE, "correlation", correlation_text(scored))
    replace_block(PAGE, "experiments", score_table(scored, BY_LABEL, len(ALL)))
    replace_block(PAGE, "trials", score_table(scored, BY_STAIN, len(PART)))


def main(names: list[str]) -> None:
    """Train and record the rows called `names`, or all without a record, one after the other, then write SCORES.md.

    Raises:
        UserError: If a name is not one of a row, or training fails as in `make`.
    """
    if unknown := set(names) - set(ROWS):
        raise UserError(f"{', '.join(sorted(unknown))}: no such row; choose from {', '.join(ROWS)}")
    scored = load()
    for row in (ROWS[name] for name in names or [name for name in ROWS if name not in scored.records]):
        if not row.members:
            make(row)
            harvest(row, scored)
            save(scored)
    write_page(scored)
    print(PAGE.read_text())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
