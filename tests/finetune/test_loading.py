"""The line that counts seconds while libraries are loaded."""

import sys
import threading
import time

import pytest

from tiltune.finetune.runs.loading import loading


def test_seconds_move_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    threads = threading.active_count()
    with loading("the run"):
        time.sleep(1.2)
    err = capsys.readouterr().err
    assert "loading the run … 0 s" in err and "loading the run … 1 s" in err and err.endswith("\n")
    assert threading.active_count() == threads, "the clock has stopped"


@pytest.mark.parametrize(("terminal", "rank"), [(False, "0"), (True, "1")])
def test_a_file_and_another_process_get_no_line(
    terminal: bool, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", rank)
    with loading("the run"):
        pass
    assert capsys.readouterr().err == ""
