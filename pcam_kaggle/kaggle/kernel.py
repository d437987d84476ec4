"""What is pushed to Kaggle: the notebook with its settings, and its metadata."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import Plan, RunSpec, changed_name, experiment, plan
from pcam_kaggle.core.files import read_json, write, write_json
from pcam_kaggle.core.paths import COMPETITION
from pcam_kaggle.kaggle.notebook import NOTEBOOK, ROOT, Settings, notebook

METADATA = Path("kernel-metadata.json")
MOST_BYTES = 900_000
# Kaggle ends a session after 12 hours and saves nothing of it.
MOST_HOURS = 11.5
DEFAULT_ACCELERATOR = "NvidiaTeslaT4"
# The accelerators that Kaggle offers and this package can use, by Kaggle's name.
ACCELERATORS = (
    *("NvidiaTeslaT4", "NvidiaTeslaT4Highmem", "NvidiaL4", "NvidiaL4X1"),
    *("NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000"),
)
# Accelerators that the session could not use, by the beginning of Kaggle's names.
UNUSABLE = {
    "NvidiaTeslaP100": "the PyTorch of Kaggle's image has no kernels for it",
    "Tpu": "a push gives a session without the TPU's software, and the package trains on GPUs",
}
# What the notebook relies on; Kaggle's defaults for missing fields differ.
NEEDED = {
    "code_file": str(NOTEBOOK),
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_tpu": False,
    "enable_internet": False,
    "machine_shape": DEFAULT_ACCELERATOR,
    "competition_sources": [COMPETITION],
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as the user asks for it.

    Attributes:
        settings: The settings in its notebook.
        weights: What to attach and to use as weights: a dataset (owner/name), a model (owner/name/framework/variation/version),
            `pretrained` to download those of timm's net, or empty for those of the experiment.
        resume: Whether to attach the kernel's own last output.
        accelerator: Kaggle's name of the accelerator.
        public: Whether everyone may see it.
        title: Its title, from which Kaggle makes its slug; empty for that of kernel-metadata.json.
    """

    settings: Settings = field(default_factory=Settings)
    weights: str = ""
    resume: bool = False
    accelerator: str = DEFAULT_ACCELERATOR
    public: bool = False
    title: str = ""

    @property
    def notebook_settings(self) -> Settings:
        """The settings in the pushed notebook: they name the weights, unless members of a blend find the attached ones."""
        if not self.weights or experiment(self.settings.experiment).members:
            return self.settings
        return replace(self.settings, changes=(*self.settings.changes, f"weights={self.weights}"))

    @property
    def plan(self) -> Plan:
        """The runs that its session trains, and the name of their blend or of the single run.

        Raises:
            UserError: There is no such experiment, or it does not admit the settings.
        """
        settings = self.notebook_settings
        name = changed_name(settings.experiment, settings.changes)
        return plan(settings.experiment, settings.changes, name, settings.seeds)

    @property
    def run(self) -> str:
        """The name of the run that its session makes."""
        return self.plan.name

    @property
    def parts(self) -> tuple[RunSpec, ...]:
        """The runs that its session trains: `run`, or those that `run` blends."""
        return self.plan.runs

    def slug(self, root: Path = ROOT) -> str:
        """Return the last part of its id, for which `root` has the metadata; raises UserError if the title can't be one."""
        if not self.title:
            return read_json(root / METADATA, id=str)["id"].rpartition("/")[2]
        made = slugged(self.title)
        # Kaggle has its own rules for other characters.
        if len(made) < 5 or not re.fullmatch(r"[A-Za-z0-9 _-]+", self.title):
            raise UserError(f"--title {self.title!r}: use at least five letters, digits, spaces and dashes")
        return made


def check_kernel(kernel: Kernel, accelerators: list[str], root: Path = ROOT) -> None:
    """Raise UserError unless Kaggle would run what `kernel` and the files in `root` mean.

    Args:
        kernel: What the user asks for.
        accelerators: Kaggle's names of those that the package can use.
        root: The repository.

    Raises:
        UserError: The tracked notebook does not match the package, metadata are missing or not what the notebook needs, the
            title's slug is not the id's, accelerator, hours or title can't be used, weights are needed and none attached, or
            the experiment does not admit the settings. Kaggle itself would accept these and misinterpret them.
    """
    for prefix, reason in UNUSABLE.items():
        if kernel.accelerator.startswith(prefix):
            raise UserError(f"--accelerator {kernel.accelerator}: {reason}; choose one of {', '.join(accelerators)}")
    if kernel.accelerator not in accelerators:
        raise UserError(f"--accelerator {kernel.accelerator}: choose one of {', '.join(accelerators)}")
    if kernel.settings.hours > MOST_HOURS:
        raise UserError(f"--hours {kernel.settings.hours:g}: Kaggle ends a session after 12; use at most {MOST_HOURS}")
    metadata = _metadata(kernel, root)
    file = root / METADATA
    wrong = [f"{key} must be {json.dumps(value)}" for key, value in NEEDED.items() if metadata[key] != value]
    slug = metadata["id"].rpartition("/")[2]
    if slug != slugged(metadata["title"]):
        wrong.append(f"title {metadata['title']!r} must become the id's {slug!r}, not {slugged(metadata['title'])!r}")
    if wrong:
        raise UserError(f"{file}: {'; '.join(wrong)}")
    sources = {part.config.weights for part in kernel.parts} - {""}
    if "pretrained" in sources and not kernel.settings.internet:
        raise UserError("weights=pretrained: are downloaded, for which the session needs internet; add --internet")
    if sources - {"pretrained"} and not (metadata["dataset_sources"] or metadata["model_sources"]):
        raise UserError(
            f"{kernel.settings.experiment}: needs pretrained weights; attach a dataset or model with --weights owner/name, or "
            "download those of timm with --internet --weights pretrained"
        )
    kernel.slug(root)
    if not (root / NOTEBOOK).is_file() or (root / NOTEBOOK).read_bytes() != notebook():
        raise UserError(f"{root / NOTEBOOK}: does not match the package; run `make kernel`")


def pack(kernel: Kernel, owner: str, folder: Path, mark: str = "", root: Path = ROOT) -> str:
    """Write the files that Kaggle's client pushes, for a kernel that `check_kernel` has accepted.

    Args:
        kernel: What the user asks for.
        owner: User name of the kernel's owner.
        folder: Where to write the notebook and its metadata.
        mark: Text by which this version is found on Kaggle, as a comment in the notebook.
        root: The repository.

    Returns:
        The kernel's id, owner/slug.

    Raises:
        UserError: The notebook is larger than 900 kB.
    """
    content = notebook(kernel.notebook_settings, mark)
    if len(content) > MOST_BYTES:
        raise UserError(f"{root / NOTEBOOK}: {len(content):,} bytes, and Kaggle takes about a million; leave modules out")
    metadata = _metadata(kernel, root)
    name = f"{owner}/{kernel.slug(root)}"
    changed = {
        "id": name,
        "title": kernel.title or metadata["title"],
        "code_file": NOTEBOOK.name,
        "is_private": not kernel.public,
        "enable_internet": kernel.settings.internet,
        "machine_shape": kernel.accelerator,
        "kernel_sources": [*metadata["kernel_sources"], *([name] if kernel.resume else [])],
    }
    write(folder / NOTEBOOK.name, lambda out: out.write(content))
    write_json(folder / METADATA.name, metadata | changed)
    return name


def slugged(title: str) -> str:
    """Return the slug that Kaggle makes of `title`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _metadata(kernel: Kernel, root: Path) -> dict[str, Any]:
    """Return the tracked metadata, with the weights of `kernel` among the sources."""
    kinds = {key: type(value) for key, value in NEEDED.items()}
    sources = dict.fromkeys(("dataset_sources", "kernel_sources", "model_sources"), list)
    metadata = read_json(root / METADATA, id=str, title=str, **sources, **kinds)
    if kernel.weights and kernel.weights != "pretrained":
        key = _source_kind(kernel.weights)
        metadata[key] = list(dict.fromkeys([*metadata[key], kernel.weights]))
    return metadata


def _source_kind(weights: str) -> str:
    """Return the list in the metadata that `weights` belongs to."""
    kinds = {2: "dataset_sources", 5: "model_sources"}
    parts = weights.split("/")
    if len(parts) not in kinds or not all(parts):
        raise UserError(
            f"--weights {weights}: must be owner/name of a dataset or owner/name/framework/variation/version of a model"
        )
    return kinds[len(parts)]
