"""The JSON files of a run, each as a typed record."""

from typing import Any, Literal

from pydantic import ValidationInfo, field_validator

from pcam_kaggle.core.config import upgraded
from pcam_kaggle.core.records import Record

# The experiment of a run of predictions that were made elsewhere, whose config has `n_splits` only.
IMPORTED = "imported"


class RunConfig(Record):
    """`config.json` of a run: what it was made from.

    `folds` is the name of the fold file, `train_sha256` the hash of the train patches, and `weights_sha256` that of the
    pretrained weights that its folds started from; None if there are none, or unknown.
    """

    experiment: str = ""
    config: dict[str, Any]
    folds: str
    folds_sha256: str
    train_sha256: str = ""
    weights_sha256: str | None = None

    @field_validator("config")
    @classmethod
    def _of_this_version(cls, config: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return config if info.data.get("experiment") == IMPORTED else upgraded(config)


class FoldMetrics(Record):
    """`metrics.json` of a fold: the result of its training.

    `valid_auc` is that of the best `epoch`, counted from 1, which a probe has not; a probe has a `penalty` relative to the mean
    loss. `macs` are the multiply-accumulate operations of a forward pass of one patch. `images_per_second` is the median rate
    of training, or the rate of a probe's embedding. `loader_wait` is the part of the last epoch's training in which it waited
    for batches, None if it was not measured, and `steps` says whether they were a CUDA graph, and why.
    """

    fold: int
    valid_auc: float
    epoch: int | None = None
    penalty: float | None = None
    parameters: int
    macs: int = 0
    seconds: float
    images_per_second: float
    loader_wait: float | None = None
    steps: str = ""


class PredictionSources(Record):
    """Hashes of what predictions were computed from: checkpoint, train and test patches."""

    best_sha256: str = ""
    train_sha256: str = ""
    test_sha256: str = ""


class PredictionsRecord(Record):
    """`predictions.json` of a fold: hashes of its tables by name, and the rate, all views of a patch counting as one."""

    sources: PredictionSources
    files: dict[str, str]
    images_per_second: float = 0.0


class TeacherRecord(Record):
    """`teacher.json` of a fold: the run whose model of that fold labels what it is trained on, and the hash of the model.

    Earlier versions recorded the hash of predictions that were trained on instead.
    """

    teacher: str
    best_sha256: str = ""


class BackendRecord(Record):
    """What a session computed on."""

    kind: Literal["cpu", "cuda", "mps"]
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"


class Environment(Record):
    """An entry of `environment.json`, a list of the sessions that worked on a run; for `measured` see `Run.measure`."""

    started: str = ""
    backend: BackendRecord
    device: str = ""
    cpus: int | None = None
    machine: str = ""
    python: str = ""
    pcam_kaggle: str = ""
    commit: str | None = None
    packages: dict[str, str | None] = {}
    data: dict[str, int | str] = {}
    measured: dict[str, float | str | None] = {}

    def __str__(self) -> str:
        measured = [f"{name.replace('_', ' ')} {value}" for name, value in self.measured.items()]
        return f"{self.device}, {', '.join(measured) or 'not measured'}"


class HeldOutSources(Record):
    """What predictions of a held-out set were computed from: patches, checkpoint of each fold, config and backend."""

    patches_sha256: str
    checkpoints: dict[int, str]
    config: dict[str, Any]
    backend: BackendRecord


class HeldOutRecord(Record):
    """The hash of a table of predictions of a held-out set, and what they were computed from."""

    sources: HeldOutSources
    csv_sha256: str
