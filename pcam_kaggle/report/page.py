"""A comparison as one self-contained HTML file: conclusions, table, figures, and pictures of patches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.files import write, write_csv
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.folds import read_groups, stain_map
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report import figures, gallery
from pcam_kaggle.report.explain import embedding, ensemble_maps
from pcam_kaggle.report.figures import FOLD_RANGE, Plot
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import KAGGLE_SCORES, read_submissions
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.held_out import EvaluationResult, ensemble_mean
from pcam_kaggle.scoring.intervals import unit_of
from pcam_kaggle.scoring.metrics import Floats, Labels
from pcam_kaggle.scoring.results import Unit
from pcam_kaggle.scoring.tables import (
    caption,
    conclusions,
    display_table,
    evaluation_sentences,
    evaluation_table,
    operating_table,
)

CALIBRATION = "The points of a calibrated model are on the diagonal. Calibration affects thresholds, not the AUC."
SLIDES = "Out of fold, within each slide, or stain group where no slides are known, that has patches of both labels."
OPERATING_POINTS = (
    "A patch is positive if its probability is at least the threshold. Youden: the highest sensitivity + specificity - 1. "
    "95 % and 99 % sensitivity: the highest threshold that reaches it. All three are chosen on the patches of the same table, "
    "so they are optimistic. Thresholds of a blend by rank are ranks. n/a: no patch is positive."
)
TEST_SET = (
    "A test patch counts once for each model of a run. D is the largest difference between the cumulative distributions "
    "(Kolmogorov-Smirnov), without a p-value, since patches of a slide are correlated. Other fractions of tumour raise it, too."
)

TEMPLATE = Path(__file__).with_name("page.html")
MISTAKES_PER_LABEL, MAX_SUSPECTS, EXAMPLES_PER_LABEL = 6, 12, 2
Item = TypeVar("Item")


@dataclass(slots=True)
class Section:
    """A section of the report; `text` describes its content, and says what is left out. Keys are headings."""

    anchor: str
    title: str
    text: str
    plots: list[Plot] = field(default_factory=list)
    tiles: str = ""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What the sections are made of.

    `name` and `oof` are of the reference, `runs` in the order of the table, `scored` with OOF tables; `suspects` is a CSV file.
    """

    comparison: Comparison
    workspace: Workspace
    suspects: Path
    name: str
    oof: pd.DataFrame
    runs: list[ComparedRun]
    scored: list[tuple[ComparedRun, pd.DataFrame]]

    def run(self, name: str) -> Run:
        """Return the run called `name`."""
        return Run(self.workspace.run(name))

    def members(self, name: str) -> list[Run]:
        """Return the experiments' runs that the run called `name` is a mean of."""
        return [self.run(member) for member in self.run(name).ensemble().weights]

    def groups(self, run: ComparedRun) -> tuple[pd.DataFrame, Unit]:
        """Return the groups (id, wsi) of the patches of `run`: those compared or of its fold file, otherwise stain groups."""
        groups, unit = self.comparison.groups, self.comparison.unit
        if run.unpaired_reason:
            groups, unit = read_groups(self.workspace.folds / f"{run.scheme}.csv"), unit_of(run.scheme)
        if groups is None:
            return stain_map(self.store(run.name), self.workspace.folds), "stain group"
        return groups, unit

    def store(self, name: str) -> PatchStore:
        """Return the store of the patches of the run called `name`, which the members of a blend share."""
        members = [member.made_from().config for member in self.members(name) if member.is_experiment]
        return PatchStore(self.workspace.store_of(max((config.get("subset", 0) for config in members), default=0)))

    def patches(self, table: pd.DataFrame, name: str) -> gallery.Images:
        """Return the patches of `table` (id), uint8 (n, 96, 96, 3), from the store of the run called `name`."""
        store = self.store(name)
        return store.images(store.rows("train", table["id"].to_numpy()))


Fill = Callable[[Report, Section], None]


def write_report(comparison: Comparison, workspace: Workspace, target: Path) -> None:
    """Write `comparison` to the HTML `target` and `suspect_labels` to a CSV beside it; a section without input says why."""
    by_name, (oof, _) = {run.name: run for run in comparison.runs}, comparison.reference.scored()
    runs = [by_name[name] for name in display_table(comparison)["run"]]
    scored = [(run, run.scored()[0]) for run in runs if not run.problem]
    suspects = target.with_name(f"{target.stem}-suspect-labels.csv")
    report = Report(comparison, workspace, suspects, comparison.reference.name, oof, runs, scored)
    sections = []
    for anchor, (title, text, fill) in SECTIONS.items():
        sections.append(section := Section(anchor, title, text))
        try:
            fill(report, section)
        except (UserError, OSError, RuntimeError) as error:
            # A missing store or an old checkpoint must not prevent the rest of the report.
            section.text = f"{section.text} Left out: {' '.join(str(error).split())[:300]}.".strip()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        heading=f"Run {report.name}" if len(runs) == 1 else f"{len(runs)} runs compared",
        about=f"{len(oof):,} patches, {oof['label'].mean():.1%} with tumour, in {oof['fold'].nunique()} folds",
        sentences=conclusions(comparison),
        sections=sections,
    )
    write(target, lambda file: file.write(page.encode()))


def _for_each(items: Iterable[Item], fill: Callable[[Item], None]) -> None:
    """Call `fill` with each of `items`, and at the end raise its errors as one UserError."""
    reasons: dict[str, None] = {}
    for item in items:
        try:
            fill(item)
        except UserError as error:
            reasons[str(error)] = None
    if reasons:
        raise UserError("; ".join(reasons))


def _plots(draw: Callable[..., Plot], further: Callable[[Report, ComparedRun], tuple[Any, ...]] = lambda *_: ()) -> Fill:
    """Return what fills a section with a plot of each scored run: `draw` of its name, its OOF table and `further` arguments."""

    def fill(report: Report, section: Section) -> None:
        _for_each(report.scored, lambda each: section.plots.append(draw(each[0].name, each[1], *further(report, each[0]))))

    return fill


def _reference(report: Report, run: ComparedRun) -> tuple[tuple[str, pd.DataFrame] | None]:
    return ((report.name, report.oof) if run.pooled else None,)


def _test(report: Report, run: ComparedRun) -> tuple[Floats]:
    stored = report.run(run.name)
    tables = stored.predictions(run.scored()[1].folds).tests if stored.is_experiment else [stored.test()]
    return (np.concatenate([table["probability"] for table in tables]),)


def _table(report: Report, section: Section) -> None:
    section.text = f"AUC, with 95 % intervals in brackets. {caption(report.comparison)} Click a heading to sort."
    section.tables[""] = display_table(report.comparison)


def _operating_points(report: Report, section: Section) -> None:
    pooled = {run.name: (oof["label"].to_numpy(), oof["probability"].to_numpy()) for run, oof in report.scored}
    section.tables["Out of fold"] = operating_table(pooled)
    for folder in sorted(report.workspace.evaluations.glob("*/")):
        means = {name: _held_out_mean(report, name, Evaluation(folder)) for name in pooled}
        means = {name: made for name, made in means.items() if len(made[0])}
        if means:
            section.tables[f"On {folder.name}, by the mean of the models"] = operating_table(means)
        if lacking := [name for name in pooled if name not in means]:
            section.text += f" Not evaluated on {folder.name} with the present models: {', '.join(lacking)}."


def _held_out_mean(report: Report, name: str, evaluation: Evaluation) -> tuple[Labels, Floats]:
    members = {run.name: evaluation.current(run) for run in report.members(name)}
    tables = {member: table for member, table in members.items() if table is not None}
    labels, mean, _ = ensemble_mean(report.run(name).ensemble(), tables)
    return labels, mean


def _learning(report: Report, section: Section) -> None:
    logs = {run.name: report.run(run.name).logs() for run in report.runs}
    section.plots = [figures.learning(name, folds) for name, folds in logs.items() if folds]
    if not section.plots:
        raise UserError("none of these runs has a log; blends and probes have no epochs")


def _held_out(report: Report, section: Section) -> None:
    def add(folder: Path) -> None:
        result = EvaluationResult.read(Evaluation(folder).result_file)
        section.text += f" {folder.name}: {' '.join(evaluation_sentences(result))}"
        section.tables[f"Scores on {folder.name}"] = evaluation_table(result)

    _for_each(sorted(report.workspace.evaluations.glob("*/")), add)
    if not section.tables:
        raise UserError(f"no run was evaluated on held-out slides (`{program()} evaluate`)")


def _mistakes(report: Report, section: Section) -> None:
    mistakes = gallery.worst_mistakes(report.oof, MISTAKES_PER_LABEL)
    patches = report.patches(mistakes, report.name)
    maps, left_out = ensemble_maps(mistakes, patches, report.run(report.name).ensemble(), report.workspace)
    section.text = f"{report.name}. The square marks the centre of {gallery.LABELLED_SIDE} px that decides the label."
    beside: list[list[gallery.Picture]] = []
    if maps is not None:
        section.text += (
            " Beside it is the Grad-CAM map by the model that was not trained on the patch, or the weighted mean of those of a "
            "blend's members: bright regions contributed most to the prediction."
        )
        beside = [[(gallery.jpeg(*each), "Grad-CAM map of the same patch")] for each in zip(patches, maps, strict=True)]
    if left_out:
        section.text += f" Without Grad-CAM maps of {'; '.join(left_out)}."
    section.tiles = gallery.patch_tiles(patches, mistakes[["id", "label", "fold", "probability"]], gallery.ERRORS, beside)


def _suspects(report: Report, section: Section) -> None:
    ensembles = {run.name: report.run(run.name).ensemble() for run, _ in report.scored}
    tables = {run.name: oof for run, oof in report.scored if not ensembles[run.name].ranked}
    single = {name: oof for name, oof in tables.items() if [*ensembles[name].weights] == [name]}
    used = single if len(single) > 1 else tables
    if not used:
        raise UserError("a blend of ranks has no probabilities")
    table = gallery.suspect_labels(used)
    write_csv(report.suspects, table)
    names = ", ".join(name if name in single else f"{name} (a blend)" for name in used)
    by = f"each of {names} that has predicted the patch, at least two" if len(used) > 1 else f"one run only, {names}"
    section.text = (
        "Train patches labelled tumour with an out-of-fold probability below 0.1, or labelled no tumour with one above 0.9, by "
        f"{by}: {len(table):,}. {report.suspects.name} has all, this page the most extreme."
    )
    shown = table.head(MAX_SUSPECTS)
    patches = report.patches(shown, max(used, key=lambda name: len(used[name])))
    means = shown[["id", "label"]].assign(**{"mean probability": shown.iloc[:, 2:].mean(axis=1)})
    section.tiles = gallery.patch_tiles(patches, means, ("Labelled tumour", "Labelled no tumour"))


def _embedding(report: Report, section: Section) -> None:
    fold = min(report.comparison.folds)
    run, table = embedding(report.members(report.name), fold, report.store(report.name))
    section.text = (
        f"Validation patches of fold {fold} under the model of {run.name} that was not trained on them: the features that its "
        "classifier reads, on their first two principal components. Crosses are mistakes at a threshold of 0.5."
    )
    is_wrong = table["label"] != (table["probability"] >= 0.5)
    words = table["label"].map({0: "no tumour", 1: "tumour"})
    section.plots = [figures.embedding(run.name, table, words, "label", table[is_wrong])]
    groups, unit = report.groups(report.comparison.reference)
    section.plots += [figures.embedding(run.name, table, table["id"].map(groups.set_index("id")["wsi"]), unit)]


def _augmentation(report: Report, section: Section) -> None:
    run = report.run(report.name)
    if not run.is_experiment or run.config().probe:
        raise UserError(f"{run.name} was not trained on augmented patches itself; blends and probes are not")
    run.check_models()
    examples = gallery.draw_examples(report.oof, EXAMPLES_PER_LABEL)
    section.tiles = gallery.augmentation_tiles(report.patches(examples, run.name), examples, run.config())
    section.text = f"{run.name}: train patches, and beside each random versions as the model sees them in training."


def _correlation(report: Report, section: Section) -> None:
    reference = report.comparison.reference
    paired = {run.name: oof["probability"] for run, oof in report.scored if run is reference or run.pooled}
    if len(paired) < 2:
        raise UserError("needs two runs that are scored on the same patches and folds")
    section.plots = [figures.correlation([*paired], np.stack([*paired.values()]))]


def _leaderboard(report: Report, section: Section) -> None:
    records = read_submissions(report.workspace.submissions).values()
    scores = [(made.oof_auc.value, made.public_score, made.private_score) for made in records]
    table = pd.DataFrame(scores, columns=["oof_auc", *KAGGLE_SCORES], dtype=float)
    section.plots = [figures.cv_versus_lb(table)]


# Title, text and content of each section, by its anchor.
SECTIONS: dict[str, tuple[str, str, Fill]] = {
    "table": ("Comparison", "", _table),
    "roc": ("ROC curves", FOLD_RANGE, _plots(figures.roc, _reference)),
    "precision-recall": ("Precision-recall curves", FOLD_RANGE, _plots(figures.precision_recall, _reference)),
    "histogram": ("OOF probabilities by label", "Errors are where the two distributions overlap.", _plots(figures.histogram)),
    "reliability": ("Calibration", CALIBRATION, _plots(figures.reliability)),
    "operating-points": ("Operating points", OPERATING_POINTS, _operating_points),
    "test": ("OOF and test probabilities", TEST_SET, _plots(figures.oof_and_test, _test)),
    "learning": ("Learning curves", "Per epoch, from each fold's log.", _learning),
    "slides": ("AUC by slide", SLIDES, _plots(figures.slide_aucs, Report.groups)),
    "evaluations": ("Held-out slides", "", _held_out),
    "mistakes": ("Worst mistakes", "", _mistakes),
    "suspects": ("Suspect labels", "", _suspects),
    "embedding": ("Embedding map", "", _embedding),
    "augmentation": ("Augmentation", "", _augmentation),
    "correlation": ("Correlation between runs", "A blend gains most from runs that are accurate and differ.", _correlation),
    "leaderboard": ("CV versus LB", "Does a better OOF AUC mean a better score on Kaggle?", _leaderboard),
}
