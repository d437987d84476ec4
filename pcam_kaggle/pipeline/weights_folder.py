"""What a folder of weights in Hugging Face's layout says about its model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.paths import attached_folder, user_path
from pcam_kaggle.core.records import Record

# Arguments that this package passes itself, or that a config has a field for.
OWN_ARGUMENTS = ("num_classes", "in_chans", "drop_rate", "img_size")


class _Input(Record):
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    input_size: tuple[int, int, int] = (0, 0, 0)


class _FolderConfig(_Input):
    """The config.json of a folder; older versions of timm write the fields of `pretrained_cfg` at the top."""

    advice = "correct it"
    architecture: str = ""
    model_args: dict[str, Any] = {}
    global_pool: str | None = None
    pretrained_cfg: _Input | None = None


def with_folder_settings(assignments: Sequence[str]) -> list[str]:
    """Return `assignments` (`key=value`) preceded by what the folder that they assign to `weights` says about its model.

    A folder in Hugging Face's layout has a `config.json` as timm writes it: architecture, its arguments, and the mean, standard
    deviation and size of its input. An assignment to one of these has precedence; `model_args` are merged. Raises UserError if
    the folder has several config.json, or one that does not name a model of timm while no assignment does.
    """
    given = dict(assignment.partition("=")[::2] for assignment in assignments)
    folder = _folder(given.get("weights", ""))
    files = sorted(folder.rglob("config.json")) if folder else []
    if folder and len(files) > 1:
        found = examples([str(file.relative_to(folder)) for file in files])
        raise UserError(f"weights={given['weights']}: must hold one config.json, but holds {found}; name the folder of one")
    content = _FolderConfig.read(files[0]) if files else _FolderConfig()
    if not content.architecture:
        if files and "model" not in given:
            raise UserError(f"{files[0]}: names no architecture, so it is not timm's; add --set model=timm:NAME")
        return list(assignments)
    added = [] if "model" in given else [f"model=timm:{content.architecture.partition('.')[0]}"]
    try:
        own_arguments = {**json.loads(given.get("model_args") or "{}")}
    except (TypeError, ValueError):
        # `Config` reports what is wrong with them.
        return [*added, *assignments]
    about = content.pretrained_cfg or content
    arguments = {
        # Encoders without a classifier may have an empty global_pool, which returns tokens that are not pooled.
        **{key: value for key, value in content.model_args.items() if key not in OWN_ARGUMENTS and value != ""},
        **({"global_pool": content.global_pool} if content.global_pool else {}),
        **{key: list(values) for key, values in (("mean", about.mean), ("std", about.std)) if values},
        **own_arguments,
    }
    side = content.model_args.get("img_size") or about.input_size[-1]
    if "img_size" not in arguments and "resize" not in given:
        added.append(f"resize={side[-1] if isinstance(side, list) else side}")
    kept = [assignment for assignment in assignments if not assignment.startswith("model_args=")]
    return [*added, *kept, f"model_args={json.dumps(arguments)}"]


def _folder(weights: str) -> Path | None:
    """Return the folder that `weights` names, perhaps a dataset or model attached to a kernel; None if it is no folder."""
    if weights in ("", "wheel", "pretrained"):
        return None
    return user_path(weights) if user_path(weights).is_dir() else attached_folder(weights)
