"""Where things are: the competition's folder, and what the pipeline writes."""

import os
from dataclasses import dataclass
from pathlib import Path

from pcam_kaggle import UserError

COMPETITION = "histopathologic-cancer-detection"
# Elsewhere only where a kernel is tried out at home.
KAGGLE_ROOT = Path(os.environ.get("PCAM_KAGGLE", "/kaggle"))
DEMO_SUFFIX = "-not-for-kaggle"
SLIDE_MAPS = ("patch_id_wsi_full.csv", "patch_id_wsi.csv")


@dataclass(frozen=True, slots=True)
class Data:
    """A folder in the competition's layout."""

    root: Path

    @property
    def labels(self) -> Path:
        """CSV of id,label of the train patches."""
        return self.root / "train_labels.csv"

    @property
    def sample(self) -> Path:
        """CSV of id,label of the test patches; its labels mean nothing."""
        return self.root / "sample_submission.csv"

    @property
    def declaration(self) -> Path:
        """JSON that tells how ids are made, where they are no SHA-1 of the pixels."""
        return self.root / "dataset.json"

    def patches(self, split: str) -> Path:
        """Folder of the TIFs of `split`, train or test."""
        return self.root / split

    def table(self, split: str) -> Path:
        """CSV that lists the patches of `split`, train or test."""
        return {"train": self.labels, "test": self.sample}[split]

    def slides(self) -> Path | None:
        """CSV of id,wsi where one lies beside the labels."""
        return next((self.root / name for name in SLIDE_MAPS if (self.root / name).is_file()), None)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders that the pipeline writes."""

    root: Path
    store: Path

    @property
    def folds(self) -> Path:
        """Fold files and their manifests."""
        return self.root / "folds"

    def run(self, experiment: str) -> Path:
        """Everything that one experiment leaves."""
        return self.root / "runs" / experiment

    @property
    def submissions(self) -> Path:
        """What Kaggle takes."""
        return self.root / "submissions"


def find_data(given: str | None, work: Path, kaggle: Path = KAGGLE_ROOT) -> Data | None:
    """Return the competition's data: `given`, else Kaggle's mounts, else `data/` under `work`, else None.

    Raises UserError where `given` holds no train_labels.csv.
    """
    if given:
        data = Data(_home(given))
        if not data.labels.is_file():
            raise UserError(f"{data.labels}: no such file; DATA must be a folder in the competition's layout")
        return data
    folders = (
        kaggle / "input" / "competitions" / COMPETITION,
        kaggle / "input" / COMPETITION,
        work / "data" / COMPETITION,
    )
    return next((Data(folder) for folder in folders if (folder / "train_labels.csv").is_file()), None)


def attached(kaggle: Path = KAGGLE_ROOT) -> list[Path]:
    """Return the folders of the datasets, models and notebook outputs that are attached to a kernel, in either layout."""
    mounts = [
        path for layout in ("*", "datasets/*/*", "notebooks/*/*", "models/*/*") for path in (kaggle / "input").glob(layout)
    ]
    return sorted(path for path in mounts if path.name not in ("competitions", "datasets", "notebooks", "models", COMPETITION))


def find_workspace(work: str | None, kaggle: Path = KAGGLE_ROOT) -> Workspace:
    """Return `work`, else Kaggle's working folder with the store outside of what a session saves, else the current folder."""
    if not work and (kaggle / "working").is_dir():
        return Workspace(kaggle / "working", kaggle / "temp" / "store")
    root = _home(work or ".")
    return Workspace(root, root / "store")


def _home(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111, unlike Path.expanduser it leaves an unknown user's ~ alone


def demo_workspace(workspace: Workspace) -> Workspace:
    """Return the folders of the demo, apart from all that is real."""
    return Workspace(workspace.root / "demo", workspace.root / "demo" / "store")


def runs_workspace(workspace: Workspace) -> Workspace:
    """Return `workspace` where it holds runs, else the demo's."""
    return workspace if (workspace.root / "runs").is_dir() else demo_workspace(workspace)


def demo_data(demo: Workspace) -> Data:
    """Return the folder of the synthetic patches in the workspace of the demo."""
    return Data(demo.root / "data")
