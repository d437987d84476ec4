"""Configs: what they accept and refuse, how they are stored and shown, and the named experiments."""

import dataclasses
import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from pcam_kaggle.cli.config_table import GROUPS, config_table, render_config
from pcam_kaggle.core.config import Config, upgraded
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import BASELINE, EXPERIMENTS, experiment, plan

PROBED: dict[str, Any] = {"model": "timm:resnet18", "weights": "x.pth", "freeze": 1, "probe": True}
NAMES = [field.name for field in dataclasses.fields(Config)]
INTEGERS = [name for name, value in asdict(Config()).items() if type(value) is int and name != "tta"]
FLOATS = [name for name, value in asdict(Config()).items() if type(value) is float]
OUT_OF_RANGE = [
    *(("epochs", value, "must be in [1, 10000]") for value in (0, 10_001)),
    *(("seed", value, "must be in [0, 4294967295]") for value in (-1, 2**32)),
    *(("lr", value, "must be in [1e-08, 10]") for value in (0, float("nan"))),
    *(("epochs", value, "must be of type int") for value in (3.0, "3")),
    *(("lr", value, "must be of type float") for value in ("0.1", True)),
    ("n_splits", 1, "must be in [2, 100]"),
    ("dropout", 1.0, "must be in [0, 0.99]"),
    ("tta_shift", 9, "must be in [0, 8]"),
    ("side", 98, "must be in [32, 96]"),
    ("body", "wide", "choose one of plain, bottleneck"),
    ("tta", 2, "choose one of 1, 4, 8"),
    ("teacher", None, "must be of type str"),
    ("probe", 1, "choose one of false, true"),
]
REFUSED = [
    *(({name: value}, f"{name}={value}: {reason}") for name, value, reason in OUT_OF_RANGE),
    ({"epoch": 3}, "epoch: no such field; closest: epochs; `python -m pcam_kaggle config` lists all"),
    # Text of a damaged file is one short line, too.
    ({"body": "wi\nde\n" * 1000}, f"body={('wi de ' * 14)[:80]}: choose one of plain, bottleneck"),
    ({"side": 63}, "side=63: must be even, so that a crop has the patch's centre"),
    ({"width": 6}, "width=6, max_width=512: both must be multiples of 4"),
    ({"max_width": 16}, "width=32, max_width=16: max_width must not be below width"),
    ({"symmetry": "d4", "head": "flatten"}, "symmetry=d4 with head=flatten: needs head=pool"),
    ({"symmetry": "d4", "width": 8}, "symmetry=d4 with width=8, max_width=512: needs multiples of 16 and of 32"),
    ({"teacher": "../old"}, "teacher=../old: must be the name of a run, not a path"),
    ({"weights": "wheel"}, "weights=wheel: for timm models only; use model=timm:NAME"),
    ({"model": "resnet18"}, "model=resnet18: choose cnn or timm:NAME"),
    (PROBED | {"freeze": 0.5}, "probe=true: on a frozen model; use freeze=1, and no teacher"),
    (PROBED | {"teacher": "old"}, "probe=true: on a frozen model; use freeze=1, and no teacher"),
    (PROBED | {"n_splits": 2}, "probe=true: chooses its penalty on the other folds; use n_splits=3 or more"),
    (PROBED | {"weights": ""}, "freeze=1: random layers must be trained; give weights=…"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_values_out_of_range_or_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Config(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_no_number_is_a_bool_and_none_is_infinite(name: str) -> None:
    for value in (False, True):
        with pytest.raises(UserError, match=rf"^{name}={value}: "):
            Config(**{name: value})
    for text in ("nan", "inf", "-inf"):
        with pytest.raises(UserError, match=rf"{name}={text}: (must be in |not a number of type int)"):
            Config().changed([f"{name}={text}"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs", "--set epochs: write key=value"),
        ("epochs=many", "--set epochs=many: not a number of type int"),
        ("lr=", "--set lr=: not a number of type float"),
        ("dropout=1.5", "dropout=1.5: must be in [0, 0.99]"),
        ("probe=yes", "probe=yes: choose one of false, true"),
        ("epoch=3", "--set epoch=3: no such field; closest: epochs; `python -m pcam_kaggle config` lists all"),
        ("xyzzy=1", "--set xyzzy=1: no such field; `python -m pcam_kaggle config` lists all"),
    ],
)
def test_assignments_that_cannot_be_parsed_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Config().changed([assignment])
    assert str(caught.value) == message


def test_assignments_are_parsed_by_the_fields_type() -> None:
    texts = ["epochs=2", "epochs=3", "lr=1", "tta=4", "body=plain", "weights=a=b", "model=timm:x", "probe=true", "freeze=1"]
    config = Config().changed(texts)
    changes: dict[str, Any] = {"epochs": 3, "lr": 1.0, "tta": 4, "body": "plain", "weights": "a=b", "model": "timm:x"}
    changes |= {"probe": True, "freeze": 1.0}
    assert config == replace(Config(), **changes)
    assert [type(getattr(config, name)) for name in changes] == [type(value) for value in changes.values()]


def test_old_configs_are_upgraded() -> None:
    old = {name: value for name, value in (asdict(Config()) | PROBED).items() if name not in ("probe", "chroma_blur")}
    assert upgraded(old | {"optimizer": "logistic", "gone": 1}) == asdict(Config(**PROBED)) | {"gone": 1}


def test_json_round_trip_is_exact() -> None:
    text = json.dumps(asdict(Config()) | PROBED | {"lr": 1, "dropout": 0})
    assert json.dumps(asdict(Config(**json.loads(text)))) == text


def test_every_field_is_described_in_the_table() -> None:
    rows = config_table(Config())
    assert [name for name, *_ in rows] == NAMES
    assert all(allowed and meaning.endswith(".") for _, _, allowed, meaning in rows)
    assert [name for name in NAMES if name in GROUPS] == list(GROUPS)
    assert NAMES[0] in GROUPS


@pytest.mark.parametrize(("name", "fields"), [("lite0", NAMES), ("blend", ["groups", "n_splits", "subset"])])
def test_a_rendered_config_fits_its_width_and_a_blend_shows_its_folds_alone(name: str, fields: list[str]) -> None:
    lines = render_config(experiment(name), 110).splitlines()
    assert max(map(len, lines)) <= 110
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == ["field", *fields]


def test_an_unknown_experiment_and_changes_or_seeds_of_a_blend_are_refused() -> None:
    with pytest.raises(UserError, match=rf"^-e lite: no such experiment; choose one of {', '.join(EXPERIMENTS)}$"):
        experiment("lite")
    with pytest.raises(UserError, match=r"^epochs=3: a blend of bottleneck, pretrained has no settings of its own"):
        experiment("blend").changed(["epochs=3"])
    assert experiment("blend").changed([]) == experiment("blend").config
    with pytest.raises(UserError, match=r"--seeds 2: blend is a blend; use -e with one of bottleneck, pretrained"):
        plan("blend", seeds=2)
    with pytest.raises(UserError, match="no such experiment"):
        experiment("blend-seed7")
    assert experiment("lite0-seed7").config == replace(experiment("lite0").config, seed=7)


def test_members_of_an_experiment_share_its_folds() -> None:
    for chosen in EXPERIMENTS.values():
        configs = [chosen.config, *(experiment(name).config for name in chosen.members)]
        assert len({(config.groups, config.n_splits) for config in configs}) == 1


def test_the_baseline_is_frozen() -> None:
    pinned = (
        "groups=auto n_splits=5 subset=0 model=cnn model_args= weights= side=96 resize=0 pool=default freeze=0 "
        "grad_checkpointing=False body=plain symmetry=none n_blocks=4 width=32 max_width=512 head=flatten hidden=256 "
        "dropout=0.5 stain_jitter=0.05 "
        "color_jitter=0.1 epochs=10 batch_size=64 probe=False optimizer=adamw lr=0.002 layer_decay=1.0 average_epochs=3.0 "
        "teacher= precision=auto seed=42 tta=8 tta_shift=0 chroma_blur=0.0 norm=train"
    )
    assert " ".join(f"{name}={value}" for name, value in asdict(EXPERIMENTS[BASELINE].config).items()) == pinned
