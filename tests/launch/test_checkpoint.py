"""`tiltune checkpoint`: what is there, what is damaged, and the exit status that a script reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiltune.finetune.runs.checkpoint import save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of steps 20 and 40."""

    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(1_500_000))

    for step in (20, 40):
        save(tmp_path / "my-run" / "checkpoints", step, write, keep=2)
    return tmp_path / "my-run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_good_checkpoints_are_listed_newest_first(tiltune: Callable[..., Any], run: Path) -> None:
    before = contents(run)
    shown = tiltune("checkpoint", "list", run)
    assert shown.status == 0 and shown.err == ""
    assert [line.split() for line in shown.out.splitlines()] == [
        ["step", "size"], ["40", "1.50", "MB", "good", "(last)"], ["20", "1.50", "MB", "good"],
    ]  # fmt: skip
    shown = tiltune("checkpoint", "verify", run)
    assert shown.status == 0 and shown.out == "step-00000040: good\nstep-00000020: good\n"
    assert contents(run) == before


def test_every_problem_of_a_damaged_one_is_named_with_status_1(tiltune: Callable[..., Any], run: Path) -> None:
    os.truncate(run / "checkpoints" / "step-00000040" / "weights", 10)
    (run / "checkpoints" / "step-00000040" / "hook.py").touch()
    before = contents(run)
    shown = tiltune("checkpoint", "list", run)
    assert shown.status == 1 and "damaged: 'hook.py' is not in manifest.json" in shown.out
    shown = tiltune("checkpoint", "verify", run)
    assert shown.status == 1
    assert shown.out.splitlines() == [
        "step-00000040: damaged",
        "    'hook.py' is not in manifest.json",
        "    'weights' has 10 bytes instead of 1500000",
        "step-00000020: good",
    ]
    assert contents(run) == before


@pytest.mark.parametrize("action", ["list", "verify"])
def test_a_pointer_to_nothing_is_damage_too(tiltune: Callable[..., Any], run: Path, action: str) -> None:
    (run / "checkpoints" / "last").write_text("step-00000060")
    shown = tiltune("checkpoint", action, run)
    assert shown.status == 1 and "last names 'step-00000060'" in shown.out and "(last)" not in shown.out


def test_bad_usage_has_status_2(tiltune: Callable[..., Any], run: Path) -> None:
    for arguments, says in (
        (("list", run / "nothing"), "holds no checkpoints"),
        (("verify", run / "checkpoints"), "holds no checkpoints"),
        (("repair", run), "verify"),
        (("list",), "RUN"),
    ):
        shown = tiltune("checkpoint", *arguments)
        assert shown.status == 2 and says in shown.err
    (run / "empty" / "checkpoints").mkdir(parents=True)
    assert "is empty" in tiltune("checkpoint", "list", run / "empty").err
