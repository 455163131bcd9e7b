"""Completion as a shell asks for it: the script is sourced in bash, and its function answers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiltune.launch.cli import VERBS
from tiltune.tasks.task import TASKS


@pytest.fixture
def complete(tiltune: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, list[str]]]:
    """Lines, the last word of each unfinished → what Tab offers there."""
    shown = tiltune("completion", "bash")
    assert shown.status == 0
    script = tmp_path / "completion.bash"
    script.write_text(shown.out)
    (tmp_path / "run.yaml").touch()
    (tmp_path / "my-run").mkdir()

    def ask(*lines: str) -> dict[str, list[str]]:
        code = [
            f"source {script}",
            "complete -p tiltune",
            'ask() { COMP_WORDS=(tiltune "$@"); COMP_CWORD=$#; COMPREPLY=(); _tyro_tiltune; echo "${COMPREPLY[*]}"; }',
        ]
        for line in lines:
            code.append("ask " + " ".join(f"'{word}'" for word in line.split(" ")))
        done = subprocess.run(["bash", "-c", "\n".join(code)], capture_output=True, text=True, check=True, cwd=tmp_path)
        registered, *answers = done.stdout.splitlines()
        # Where nothing of ours fits, bash offers files: the folders of runs.
        assert registered == "complete -o default -F _tyro_tiltune tiltune"
        assert not done.stderr
        return dict(zip(lines, (answer.split() for answer in answers), strict=True))

    return ask


def test_bash_completes_verbs_tasks_flags_choices_and_files(complete: Callable[..., dict[str, list[str]]]) -> None:
    found = complete(
        "", "tr", "train ", "train di", "train --obj", "train --objective r", "train digits --batch", "train --config ru",
        "export --format ", "completion ", "2d --chain d", "evaluate my",
    )  # fmt: skip
    assert set(VERBS) <= set(found[""])
    assert found["tr"] == ["train"]
    assert set(TASKS) <= set(found["train "])
    assert found["train di"] == ["digits"]
    assert found["train --obj"] == ["--objective"]
    assert found["train --objective r"] == ["rtb", "reinforce_kl"]
    assert found["train digits --batch"] == ["--batch-size"]
    assert found["train --config ru"] == ["run.yaml"]
    assert found["export --format "] == ["pipeline", "lora", "merged"]
    assert {"bash", "zsh", "fish"} <= set(found["completion "])
    assert found["2d --chain d"] == ["ddpm", "ddim"]
    assert found["evaluate my"] == []  # left to bash's own files


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_a_script_that_names_everything(tiltune: Callable[..., Any], shell: str, tmp_path: Path) -> None:
    shown = tiltune("completion", shell)
    assert shown.status == 0
    for name in (*VERBS, *TASKS, "--certificate-size"):
        assert name in shown.out
    if found := shutil.which(shell):
        (tmp_path / "script").write_text(shown.out)
        subprocess.run([found, "-n", tmp_path / "script"], check=True, capture_output=True)


def test_the_script_names_no_shell_that_is_not_there(tiltune: Callable[..., Any]) -> None:
    shown = tiltune("completion", "powershell")
    assert shown.status == 2
    assert "powershell" in shown.err
