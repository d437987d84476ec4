"""The command line: environment variables set before torch is imported, choice of the data, and error messages."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from conftest import Outcome

from pcam_kaggle.cli import commands
from pcam_kaggle.cli.main import main
from pcam_kaggle.cli.parser import COMMANDS as PARSED
from pcam_kaggle.cli.parser import METHODS
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import read_json
from pcam_kaggle.core.paths import Data
from pcam_kaggle.core.process import ENVIRONMENT
from pcam_kaggle.scoring.blend import Method

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which only those of our variables are set that are in `environment`."""
    clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_openmp_reads_the_spin_count_that_we_set(tmp_path: Path) -> None:
    line = ["pcam_kaggle", "compare", "--work", str(tmp_path)]
    code = f"import runpy, sys\nsys.argv = {line!r}\nrunpy.run_module('pcam_kaggle', run_name='__main__')"
    shown = python(code, OMP_DISPLAY_ENV="VERBOSE").stderr
    assert f"GOMP_SPINCOUNT = '{ENVIRONMENT['GOMP_SPINCOUNT']}'" in shown
    assert "GOMP_SPINCOUNT = '7'" in python(code, OMP_DISPLAY_ENV="VERBOSE", GOMP_SPINCOUNT="7").stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "--format", "xml"]])
def test_help_and_wrong_arguments_import_nothing_slow(arguments: list[str]) -> None:
    code = "import sys\nfrom pcam_kaggle.cli.main import main\n"
    code += f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
    code += "print([name for name in ('torch', 'pandas', 'numpy', 'cv2', 'albumentations') if name in sys.modules])"
    assert python(code).stdout.splitlines()[-1] == "[]"


def test_choices_are_those_that_the_blend_knows() -> None:
    assert get_args(Method) == METHODS


def test_every_command_that_is_parsed_is_carried_out() -> None:
    assert [command.name for command in PARSED] == list(commands.COMMANDS)


@pytest.mark.parametrize("arguments", [["-e", "quick"], ["--set", "epochs=1"], ["--groups", "none"], ["--slides", "map.csv"]])
def test_options_for_real_data_do_not_fall_back_to_the_demo(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline", "--work", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {' '.join(arguments)}: no data of the competition found")
    assert "--demo" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["-e", "unheard"], ["--set", "epochs=many"], ["--name", "a/b"], ["--folds", "0,7"], ["--slides", "none.csv"]],
)
def test_a_mistake_is_noticed_before_the_demo_is_written(arguments: list[str], tmp_path: Path) -> None:
    assert main(["pipeline", "--demo", "--work", str(tmp_path), *arguments]) == 2
    assert not list(tmp_path.iterdir())


def test_the_demo_can_be_asked_for_beside_real_data(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PCAM_DATA", str(data.root))
    work = tmp_path / "work"
    assert main(["prepare", "--demo", "-e", "quick", "--work", str(work)]) == 0
    assert [path.name for path in work.iterdir()] == ["demo"]
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"next: python -m pcam_kaggle folds --demo --work {work} -e quick"
    with pytest.raises(SystemExit):
        main(["prepare", "--demo", "--data", str(data.root)])


def test_a_fold_named_twice_is_worked_on_once(finished_run: Path, pcam: Callable[..., Outcome]) -> None:
    assert pcam("blend", "--folds", "1,0,1").status == 0
    assert read_json(finished_run / "runs" / "bottleneck" / "metrics.json")["folds"] == [0, 1]


def test_folds_of_a_blend_are_those_of_its_members(finished_run: Path, pcam: Callable[..., Outcome]) -> None:
    blend = ("blend", "bottleneck", "--name", "other", "--set", "n_splits=2", "--folds")
    assert pcam(*blend, "2").status == 0
    assert "bottleneck has folds 0 to 2" in pcam(*blend, "3").err


def test_runs_of_the_demo_are_not_compared_in_silence(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run.rename(tmp_path / "demo")
    capsys.readouterr()
    assert main(["compare", "--format", "json", "--work", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("{")
    assert "these are the synthetic demo's" in printed.err
    assert main(["blend", "bottleneck", "--name", "other", "--work", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("This is the synthetic demo")


def test_runs_are_blended_without_the_data_that_they_were_trained_on(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["blend", "bottleneck", "--name", "alone", "--work", str(tmp_path / "work")]) == 0, capsys.readouterr().err
    assert (tmp_path / "work" / "runs" / "alone" / "metrics.json").exists()
    assert not (tmp_path / "work" / "demo").exists()


def test_an_error_of_the_system_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert main(["prepare", "--demo", "--work", str(blocked)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {blocked}")


def raising(error: UserError) -> Callable[[object], None]:
    """Return a command that raises `error` where another exception has been caught."""

    def fail(_: object) -> None:
        try:
            raise KeyError("the cause")
        except KeyError:
            raise error from None

    return fail


@pytest.mark.parametrize(("option", "variable"), [(["--debug"], "0"), ([], "1"), ([], "0")])
def test_debug_prints_what_an_error_was_raised_from(
    option: list[str], variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PCAM_DEBUG", variable)
    monkeypatch.setitem(commands.COMMANDS, "compare", raising(UserError("the message")))
    assert main(["compare", "--work", str(tmp_path), *option]) == 2
    *traceback, last = capsys.readouterr().err.splitlines()
    assert last == "error: the message"
    assert any("the cause" in line for line in traceback) == bool(option or variable == "1")


def test_a_long_list_goes_to_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    items = [f"item {number}" for number in range(6)]
    monkeypatch.setitem(commands.COMMANDS, "compare", raising(UserError("too many", items)))
    assert main(["compare", "--work", str(tmp_path)]) == 2
    file = tmp_path / "error-details.txt"
    assert capsys.readouterr().err == f"error: too many; all 6 are listed in {file}\n"
    assert file.read_text().splitlines() == items
    file.unlink()
    file.mkdir()
    assert main(["compare", "--work", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: too many; the list of all 6 can't be written: ")


@pytest.mark.parametrize("folder", ["/a folder/x", "/it's mine", '/a "b"'])
def test_make_passes_a_folder_as_one_word(folder: str) -> None:
    # Without the variables of the make that may run the tests.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    line = ["make", "-n", "submission", f"DATA={folder}"]
    done = subprocess.run(line, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[words.index("--data") + 1] == folder


@pytest.mark.slow
def test_what_only_unix_has_is_not_needed(tmp_path: Path) -> None:
    options = ["pipeline", "--demo", "--work", str(tmp_path), "--hours", "1"]
    fields = ["width=4", "n_blocks=2", "side=32", "hidden=8", "epochs=1", "n_splits=2", "precision=fp32"]
    options += [part for field in fields for part in ("--set", field)]
    code = "import sys\nsys.modules['fcntl'] = None\nimport os\n"
    code += "for name in ('nice', 'sched_setscheduler', 'sched_getaffinity', 'SCHED_BATCH'):\n"
    code += "    delattr(os, name)\n"
    code += f"from pcam_kaggle.cli.main import main\nsys.exit(main({options!r}))"
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo" / "submissions" / "demo-not-for-kaggle.csv").exists()


def test_the_package_installs_with_its_dependencies_and_its_command(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    # setuptools leaves its intermediate files in the folder that it builds.
    shutil.copytree(ROOT / "pcam_kaggle", source / "pcam_kaggle", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements-pretrained.txt"):
        shutil.copy(ROOT / name, source)
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    metadata = next(target.glob("pcam_kaggle-*.dist-info")) / "METADATA"
    needed = [line.partition(": ")[2] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    assert [name for name in needed if "extra" not in name] == (ROOT / "requirements.txt").read_text().splitlines()
    modules = {path.name for path in (source / "pcam_kaggle").iterdir()}
    assert modules <= {path.name for path in (target / "pcam_kaggle").iterdir()}
    line = [target / "bin" / "pcam", "--help"]
    command = subprocess.run(line, env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True)
    assert "prepare" in command.stdout


def test_the_next_command_after_a_blend_names_it(finished_run: Path, pcam: Callable[..., Outcome]) -> None:
    shutil.copytree(finished_run / "runs" / "bottleneck", finished_run / "runs" / "second")
    *_, last = pcam("blend", "bottleneck", "second").out.splitlines()
    assert last.startswith("next: python -m pcam_kaggle submission --data ")
    assert "--name bottleneck-second" in last
