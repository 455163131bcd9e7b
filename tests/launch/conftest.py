"""What a stranger has: a file with functions that score samples, beside the `prior` of all tests; and processes of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tiltune.launch import cli

ENERGY = """
import torch

def ink(x):
    return x.flatten(1).mean(1)

def scaled(factor):
    return lambda x: factor * ink(x)

def stuck(x):
    raise RuntimeError("the scorer is down")

def taken_away(x):
    import signal
    signal.raise_signal(signal.SIGTERM)
    return ink(x)

seen = 0

def taken_away_later(x):
    global seen
    seen += len(x)
    return taken_away(x) if seen > 2 * 400 + 128 * 8 else ink(x)  # what a certificate of size 400 calls
"""


class Shown(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For a process of its own: the folder that holds the package, which xdist's workers have from their path alone."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def in_two_processes(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Any]]:
    """Run a script of this folder by torchrun: its name, seconds → what each of two processes wrote to FOLDER/RANK.json."""

    def run(script: str, timeout: int) -> list[Any]:
        folder = tmp_path_factory.mktemp("two")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(Path(__file__).with_name(script)), str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with my_energy.py in it."""
    (tmp_path / "my_energy.py").write_text(ENERGY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiltune(capfd: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """The command line in this process: arguments → exit status and what was printed."""

    def run(*arguments: Any) -> Shown:
        capfd.readouterr()
        threads = torch.get_num_threads()
        try:
            status = cli.run([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
        except SystemExit as exit:  # how tyro ends for --help and for flags that it cannot read
            status = exit.code if isinstance(exit.code, int) else 1
        finally:
            torch.set_num_threads(threads)
        return Shown(status, *capfd.readouterr())

    return run


@pytest.fixture
def small(prior: Path) -> list[Any]:
    """Flags of a training that takes a moment."""
    sizes = [
        "--population-size",
        8,
        "--population",
        "importance",
        "--warm-start-updates",
        2,
        "--warm-start-rows",
        4,
        "--soft-value-updates",
        1,
    ]
    slow = ["--learning-rate", 1e-5, "--warm-start-learning-rate", 1e-5]
    return ["--prior", prior, "--steps", 3, "--updates", 2, "--batch-size", 4, *sizes, *slow, "--device", "cpu"]
