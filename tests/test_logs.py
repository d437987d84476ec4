"""Log lines: progress on standard output, warnings on standard error, each once."""

import logging
import re

import pytest
from conftest import on_terminal

from pcam_kaggle.core.logs import configure_logging, fold_context, logging_verbosity, progress, status_line

log = logging.getLogger("pcam_kaggle.test")


@pytest.mark.parametrize(
    ("verbosity", "rank", "out", "err"),
    [
        (0, 0, ["step 1"], ["warning: careful"]),
        (-1, 0, [], ["warning: careful"]),
        (0, 1, [], []),
        (1, 0, ["TIME rank 0 fold -: start", "TIME rank 0 fold 3: step 1"], ["warning: TIME rank 0 fold 3: careful"]),
        (1, 1, [], ["TIME rank 1 fold -: start", "TIME rank 1 fold 3: step 1", "warning: TIME rank 1 fold 3: careful"]),
    ],
)
def test_a_line_goes_to_its_stream_and_a_verbose_one_has_time_rank_and_fold(
    verbosity: int, rank: int, out: list, err: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    # The second configuration replaces the first.
    configure_logging(1 - verbosity)
    configure_logging(verbosity)
    assert logging_verbosity() == verbosity
    log.debug("start")
    with fold_context(3):
        log.info("step %d", 1)
        log.warning("careful")
    assert [re.sub(r"20[-\d]+ [\d:,]+", "TIME", text).splitlines() for text in capsys.readouterr()] == [out, err]


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
