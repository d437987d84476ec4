"""The command line: environment variables set before torch is imported, choice of the data, and error messages."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
from conftest import Others, Outcome

from pcam_kaggle.cli import commands
from pcam_kaggle.cli.main import main
from pcam_kaggle.cli.parser import COMMANDS as PARSED
from pcam_kaggle.cli.parser import COMMON, EXAMPLES, METHODS, parser
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import read_json
from pcam_kaggle.core.paths import Data, find_data, find_workspace
from pcam_kaggle.core.process import ENVIRONMENT
from pcam_kaggle.scoring.blend import Method

ROOT = Path(__file__).parent.parent
Command = Callable[..., Outcome]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which only those of our variables are set that are in `environment`."""
    clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
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


@pytest.mark.parametrize("command", PARSED, ids=lambda command: command.name)
def test_the_help_of_a_command_explains_all_of_it(command: NamedTuple) -> None:
    groups = [each if isinstance(each, tuple) else (each,) for each in (*command.options, *COMMON)]
    texts = {option.flags: option.settings.get("help", "") for group in groups for option in group}
    assert [what for what, text in (texts | {"purpose": command.purpose}).items() if len(text.split()) < 3] == []
    parser().parse_args(shlex.split(f"{command.name} {EXAMPLES.get(command.name, '')}"))
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command.name.split(), "--help"])


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_device_and_workers_reach_the_processes_of_the_gpus(kind: str, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PCAM_DEVICE", "PCAM_WORKERS", "CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setitem(commands.COMMANDS, "train", lambda _: print(*(os.environ[name] for name in names), sep=","))
    assert cli("train", "--device", kind, "--workers", "3") == (0, f"{kind},3,{'' if kind == 'cpu' else '0'}\n", "")


def test_an_empty_variable_is_none() -> None:
    code = "from pcam_kaggle.cli.parser import parser\nprint(parser().parse_args(['train']).workers)"
    assert python(code, PCAM_WORKERS="").stdout == "None\n"


def test_messages_name_the_program_as_it_was_started(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for started, name in (("/bin/pcam", "pcam"), ("/a/pcam_kaggle/__main__.py", "python -m pcam_kaggle")):
        monkeypatch.setattr(sys, "argv", [started])
        assert f"`{name} config` lists all" in cli("config", "--set", "xyzzy=1").err


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return the command line, working in `tmp_path`."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        status = main([*arguments, "--work", str(tmp_path)])
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.mark.parametrize("arguments", [["-e", "quick"], ["--set", "epochs=1"], ["--groups", "none"], ["--slides", "map.csv"]])
def test_options_for_real_data_do_not_fall_back_to_the_demo(arguments: list[str], cli: Command, tmp_path: Path) -> None:
    outcome = cli("pipeline", *arguments)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith(f"error: {' '.join(arguments)}: no data of the competition found")
    assert "--demo" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["-e", "unheard"], ["--set", "epochs=many"], ["--name", "a/b"], ["--folds", "0,7"], ["--slides", "none.csv"]],
)
def test_a_mistake_is_noticed_before_the_demo_is_written(arguments: list[str], cli: Command, tmp_path: Path) -> None:
    assert cli("pipeline", "--demo", *arguments).status == 2
    assert not list(tmp_path.iterdir())


def test_the_demo_can_be_asked_for_beside_real_data(
    shared_data: Data, cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCAM_DATA", str(shared_data.root))
    outcome = cli("prepare", "--demo", "-e", "quick")
    assert outcome.status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert outcome.out.splitlines()[-1] == f"next: python -m pcam_kaggle folds --demo --work {tmp_path} -e quick"
    with pytest.raises(SystemExit):
        cli("prepare", "--demo", "--data", str(shared_data.root))


def test_folds_of_a_blend_are_those_of_its_members(finished_run: Path, pcam: Command) -> None:
    blend = ("blend", "bottleneck", "--name", "other", "--set", "n_splits=2", "--folds")
    assert pcam(*blend, "2,0,2").status == 0
    assert read_json(finished_run / "runs" / "other" / "metrics.json")["folds"] == [0, 2]
    assert "bottleneck has folds 0 to 2" in pcam(*blend, "3").err


def test_runs_of_the_demo_are_not_used_in_silence(finished_run: Path, cli: Command, others: Others, tmp_path: Path) -> None:
    assert cli("compare").err == f"error: {tmp_path / 'runs'}: holds no run\n"
    finished_run.rename(tmp_path / "demo")
    outcome = cli("compare", "--format", "json")
    assert (outcome.status, outcome.out[0]) == (0, "{")
    predicted = cli("evaluate", "bottleneck", "--patches", str(others.patches), "--out", str(tmp_path / "out.csv"))
    assert predicted.status == 0
    assert all("these are the synthetic demo's" in err for err in (outcome.err, predicted.err))
    assert cli("blend", "bottleneck", "--name", "other").out.startswith("This is the synthetic demo")


def test_runs_are_blended_without_the_data_that_they_were_trained_on(finished_run: Path, cli: Command, tmp_path: Path) -> None:
    (finished_run / "runs").rename(tmp_path / "runs")
    assert cli("blend", "bottleneck", "--name", "alone").status == 0
    assert (tmp_path / "runs" / "alone" / "metrics.json").exists()
    assert not (tmp_path / "demo").exists()


def test_the_next_command_after_a_blend_names_it(finished_run: Path, pcam: Command) -> None:
    shutil.copytree(finished_run / "runs" / "bottleneck", finished_run / "runs" / "second")
    *_, last = pcam("blend", "bottleneck", "second").out.splitlines()
    assert last.startswith("next: python -m pcam_kaggle submission --data ")
    assert "--name bottleneck-second" in last


def test_an_error_of_the_system_is_one_line(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "demo").touch()
    outcome = cli("prepare", "--demo")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith(f"error: {tmp_path / 'demo'}")


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
    option: list[str], variable: str, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCAM_DEBUG", variable)
    monkeypatch.setitem(commands.COMMANDS, "compare", raising(UserError("the message")))
    *traceback, last = cli("compare", *option).err.splitlines()
    assert last == "error: the message"
    assert any("the cause" in line for line in traceback) == bool(option or variable == "1")


def test_a_long_list_goes_to_a_file(monkeypatch: pytest.MonkeyPatch, cli: Command, tmp_path: Path) -> None:
    items = [f"item {number}" for number in range(5)] + ["\udcff"]
    monkeypatch.setitem(commands.COMMANDS, "compare", raising(UserError("too many", items)))
    file = tmp_path / "error-details.txt"
    assert cli("compare") == (2, "", f"error: too many; all 6 are listed in {file}\n")
    assert file.read_text().splitlines() == [*items[:5], r"\udcff"]
    file.unlink()
    file.mkdir()
    assert cli("compare").err.startswith("error: too many; the list of all 6 can't be written: ")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_terminal_lacks_are_replaced(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["pipeline", "--help"])
    print("mean ± SD of /data/\udcff …", flush=True)
    shown = sys.stdout.buffer.getvalue().decode(encoding).splitlines()
    assert shown[-1] == "mean ± SD of /data/? …".encode(encoding, "replace").decode(encoding)


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
    for path in (*(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, source)
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    metadata = next(target.glob("pcam_kaggle-*.dist-info")) / "METADATA"
    needed = [line.partition(": ")[2] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    assert [name for name in needed if "extra" not in name] == (ROOT / "requirements.txt").read_text().splitlines()
    files = {path.relative_to(source) for path in (source / "pcam_kaggle").rglob("*.*")}
    assert [path for path in files if not (target / path).exists()] == []
    for option, shown in (("--help", "usage: pcam "), ("--version", metadata.read_text().split("\nVersion: ")[1].split()[0])):
        line = [target / "bin" / "pcam", option]
        command = subprocess.run(line, env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True)
        assert shown in command.stdout


def test_an_old_command_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["kaggle", "push", "-e", "quick"])
    assert re.fullmatch(r"error: `kaggle push` is now `kaggle run --detach`; .*\n", capsys.readouterr().err)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    here = Path("/home/me/here")
    assert find_workspace("~/here").root == here
    with pytest.raises(UserError, match="/home/me/here/train_labels"):
        find_data("~/here", Path())
    paths = ["--patches", "~/here", "--labels", "~/here", "--slides", "~/here"]
    options = parser().parse_args(["evaluate", "run", *paths])
    assert (options.patches, options.labels, options.slides) == (here, here, here)
    for command in ("compare", "report", "pipeline"):
        assert parser().parse_args([command, "--slides", "~/here"]).slides == here
