"""Log lines: progress on standard output, warnings on standard error, each once."""

import logging
import re

import pytest
from conftest import on_terminal

from pcam_kaggle.core.logs import configure_logging, logging_verbosity, progress, status_line

log = logging.getLogger("pcam_kaggle.test")


def printed(capsys: pytest.CaptureFixture[str], verbosity: int) -> tuple[list[str], list[str]]:
    """Return the lines on standard output and error of one record per level."""
    configure_logging(verbosity)
    log.debug("details")
    log.info("step %d", 1)
    log.warning("careful")
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_progress_and_warnings_have_their_streams(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(capsys, 0) == (["step 1"], ["warning: careful"])
    assert printed(capsys, -1) == ([], ["warning: careful"])
    monkeypatch.setenv("RANK", "1")
    assert printed(capsys, 0) == ([], [])


def test_verbose_lines_have_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, 1)
    assert [re.sub(r"^[-\d]{10} [:,\d]{12} ", "TIME ", line) for line in out] == ["TIME details", "TIME step 1"]
    assert err[0].startswith("warning: ")


def test_a_second_configuration_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    for verbosity in (0, 1):
        configure_logging(verbosity)
        assert logging_verbosity() == verbosity
    assert len(printed(capsys, 1)[0]) == 2


@pytest.mark.parametrize(("verbosity", "rank", "is_shown"), [(0, "0", True), (-1, "0", False), (0, "1", False)])
def test_bars_are_shown_where_progress_is(verbosity: int, rank: str, is_shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("RANK", rank)
    configure_logging(verbosity, bar_position=1)
    bar = progress(range(3), "epoch 1")
    assert bar.disable is not is_shown
    assert not is_shown or abs(bar.pos) == 1
    assert list(bar) == [0, 1, 2]


@pytest.mark.parametrize(("verbosity", "lines"), [(0, ["queued", "running"]), (-1, [])])
def test_a_status_is_one_line_on_a_terminal_and_a_log_line_elsewhere(
    verbosity: int, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(verbosity)
    with on_terminal(monkeypatch) as shown, status_line() as show:
        for text in ("queued", "running", "complete"):
            show(text)
    assert "running" in shown[0] if lines else shown == [""]
    assert "\n" not in shown[0]
    assert capsys.readouterr().out == ""
    with status_line() as show:
        for text in ("queued", "queued", "running"):
            show(text)
    assert capsys.readouterr().out.splitlines() == lines
