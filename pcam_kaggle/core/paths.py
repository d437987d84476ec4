"""Paths: the competition's folder, and the folders that the pipeline writes."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pcam_kaggle.core.errors import UserError

COMPETITION = "histopathologic-cancer-detection"
# Another folder only where a kernel is tested outside of Kaggle.
KAGGLE_ROOT = Path(os.environ.get("PCAM_KAGGLE", "/kaggle"))
DEMO_SUFFIX = "-not-for-kaggle"
ALLOWED = "letters, digits, points, dashes and underscores"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SLIDE_MAPS = ("patch_id_wsi_full.csv", "patch_id_wsi.csv")
MOUNTS = ("*", "datasets/*/*", "notebooks/*/*", "models/*/*")


@dataclass(frozen=True, slots=True)
class Data:
    """The competition's data: train and test patches, labels and sample submission."""

    root: Path

    @property
    def labels(self) -> Path:
        """CSV of the train patches, columns id and label."""
        return self.root / "train_labels.csv"

    @property
    def sample(self) -> Path:
        """CSV of the test patches, columns id and label; the labels are placeholders."""
        return self.root / "sample_submission.csv"

    @property
    def declaration(self) -> Path:
        """Optional JSON that declares the ID scheme, if ids are not the SHA-1 of the pixels."""
        return self.root / "dataset.json"

    def patches(self, split: str) -> Path:
        """Return the folder of the TIFs of `split`, train or test."""
        return self.root / split

    def table(self, split: str) -> Path:
        """Return the CSV that lists the patches of `split`, train or test."""
        return {"train": self.labels, "test": self.sample}[split]

    def slides(self) -> Path | None:
        """Return the slide map beside the labels, columns id and wsi, which may still be packed; None if there is none."""
        files = (self.root / name for name in SLIDE_MAPS)
        return next((file for file in files if file.is_file() or unpack(file)), None)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders that the pipeline writes: patch stores, folds, runs, evaluations and submissions."""

    root: Path
    store: Path

    @property
    def folds(self) -> Path:
        """Fold files and their manifests."""
        return self.root / "folds"

    def store_of(self, subset: int) -> Path:
        """Return the folder of the patch store with `subset` train patches (0 for all), beside that of all patches."""
        return self.store.with_name(f"{self.store.name}-subset{subset}") if subset else self.store

    def run(self, name: str) -> Path:
        """Return the folder of the run `name`."""
        return self.root / "runs" / name

    @property
    def evaluations(self) -> Path:
        """A folder per held-out set, with predictions and scores."""
        return self.root / "evaluations"

    @property
    def submissions(self) -> Path:
        """Submission files and the ledger of their scores."""
        return self.root / "submissions"


def check_name(name: str, where: str = "") -> None:
    """Raise UserError, whose message starts with `where`, unless `name` can be the name of a file or a folder."""
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{where}{name!r} is not a plain file name; use {ALLOWED}")


def user_path(text: str) -> Path:
    """Return the path that a user wrote, as an option or a variable, with `~` expanded."""
    return Path(os.path.expanduser(text))  # noqa: PTH111, unlike Path.expanduser it leaves an unknown user's ~ alone


def unpack(path: Path) -> str:
    """Return the advice to unpack the archive that is there in place of `path`, or that `path` itself is; "" if none is."""
    archives = [file for file in (path, path.with_name(f"{path.name}.zip")) if file.suffix == ".zip" and file.is_file()]
    return f"; unpack {archives[0].name}" if archives else ""


def find_data(given: str | None, work: Path, kaggle: Path = KAGGLE_ROOT) -> Data | None:
    """Return the data `given` or raise UserError, by default those in Kaggle's mounts or `data/` under `work`, if any."""
    if given:
        data = Data(user_path(given))
        if not data.labels.is_file():
            advice = unpack(data.root) or unpack(data.labels) or "; DATA must be a folder in the competition's layout"
            raise UserError(f"{data.labels}: no such file{advice}")
        return data
    parents = (kaggle / "input" / "competitions", kaggle / "input", work / "data")
    found = (Data(parent / COMPETITION) for parent in parents)
    return next((data for data in found if data.labels.is_file()), None)


def attached() -> list[Path]:
    """Return the folders of datasets, models and notebook outputs attached to a kernel, in both of Kaggle's layouts."""
    mounts = [path for layout in MOUNTS for path in (KAGGLE_ROOT / "input").glob(layout)]
    return sorted(path for path in mounts if path.name not in ("competitions", "datasets", "notebooks", "models", COMPETITION))


def attached_folder(handle: str) -> Path | None:
    """Return the folder, if any, of an attached dataset (owner/name) or model (owner/name/framework/variation/version)."""
    kind = {2: "datasets", 5: "models"}.get(len(handle.split("/")))
    # Kaggle mounts handles such as `pyTorch` in lower case.
    pattern = re.sub("[A-Za-z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", handle)
    layouts = (f"{kind}/{pattern}", pattern.partition("/")[2]) if kind else ()
    found = (path for layout in layouts for path in sorted((KAGGLE_ROOT / "input").glob(layout)) if path.is_dir())
    return next(found, None)


def find_workspace(work: str | None, kaggle: Path = KAGGLE_ROOT) -> Workspace:
    """Return the workspace at `work`, by default Kaggle's working folder or, outside of Kaggle, the current folder."""
    if not work and (kaggle / "working").is_dir():
        # The temporary folder is not saved with the session's output.
        return Workspace(kaggle / "working", kaggle / "temp" / "store")
    root = user_path(work or ".")
    return Workspace(root, root / "store")


def demo_workspace(workspace: Workspace) -> Workspace:
    """Return the demo's own workspace within `workspace`; its data are in `data/`."""
    return Workspace(workspace.root / "demo", workspace.root / "demo" / "store")


def runs_workspace(workspace: Workspace) -> Workspace:
    """Return `workspace` if it has runs or the demo's has none either, otherwise the demo's."""
    with_runs = [each for each in (workspace, demo_workspace(workspace)) if (each.root / "runs").is_dir()]
    return with_runs[0] if with_runs else workspace
