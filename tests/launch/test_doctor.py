"""`tiltune doctor`: a healthy machine is called healthy, and each illness gets its own sentence and status 1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiltune.launch.cluster import round_trip
from tiltune.launch.doctor import machine, packages, world
from tiltune.launch.doctor.finding import Finding
from tiltune.launch.verbs import doctor

CHECKOUT = Path(__file__).parents[2]  # what is installed has no pyproject.toml


@pytest.fixture(autouse=True)
def _no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*world.WORLD, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes seconds."""
    monkeypatch.setattr(world, "two_or_more", lambda backend, size: Finding("round trip", f"{size} over {backend}"))


def test_a_healthy_machine(tiltune: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    shown = tiltune("doctor")
    assert shown.status == 0, shown.out
    lines = [line.split(maxsplit=1) for line in shown.out.splitlines()]
    assert lines.pop() == ["healthy"]
    found = dict(lines)
    assert found["torch"] == torch.__version__
    assert {"tiltune", "python", "diffusers", "accelerate", "peft", "safetensors", "devices", "disk", "threads", "memory"} <= set(
        found
    )
    trips = [value for name, value in lines if name == "round" and "gloo" in value]
    assert len(trips) == 1 and trips[0].startswith("trip") and trips[0].endswith("ms")
    assert "starting 2 processes over gloo" in shown.err  # so that nobody waits without knowing for what


def test_under_torchrun_it_uses_the_world_that_is_there(tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tiltune", "doctor"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("healthy") == 1  # rank 0 speaks
    assert "2, 2 on this machine" in done.stdout and "2 processes over gloo" in done.stdout
    assert "starting" not in done.stderr


@pytest.mark.parametrize(
    ("code", "says"),
    [("sleep 60", "no answer within"), ("echo 'no route to host' >&2; exit 1", "no route to host"), ("exit 9", "exit status 9")],
)
def test_processes_that_do_not_meet_are_killed_and_said(
    tiltune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\necho $$ >> {tmp_path}/started\n{code.replace('sleep', 'exec sleep')}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(world, "TIMEOUT", 0.2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shown = tiltune("doctor")
    assert shown.status == 1 and "healthy" not in shown.out
    wrong = [line for line in shown.out.splitlines() if line.startswith("wrong")]
    assert len(wrong) == 1 and says in wrong[0] and "GLOO_SOCKET_IFNAME" in wrong[0]
    for process in (tmp_path / "started").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_a_wrong_sum_is_no_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = {"init_method": f"file://{tmp_path}/meet", "rank": 0, "world_size": 1}
    assert round_trip.round_trip("gloo", **group) >= 0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number: number.add_(1))
    with pytest.raises(RuntimeError, match="not to 1"):
        round_trip.round_trip("gloo", **(group | {"init_method": f"file://{tmp_path}/again"}))
    assert not torch.distributed.is_initialized()


def a_world(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    """The environment of a process under torchrun."""
    for name, value in zip(world.WORLD, (rank, rank, "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)


def ill(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make this machine ill in one way."""
    import psutil

    if name == "disk":
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e9))
    elif name == "memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5e8, total=8e9))
    elif name == "read-only":
        monkeypatch.setattr(machine.os, "access", lambda folder, mode: False)
    elif name == "missing":
        version = packages.installed
        monkeypatch.setattr(packages, "installed", lambda package: None if package == "accelerate" else version(package))
    elif name == "old":
        monkeypatch.setattr(packages, "requirements", lambda: {"torch": ">=99"})
    elif name == "broken":
        monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None)
    elif name == "half a world":
        monkeypatch.setenv("RANK", "0")
    elif name == "crowded":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="GPU", total_memory=2**34))
        a_world(monkeypatch, rank="0")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr(world, "round_trip", lambda backend: 0.001)
    elif name == "no answer":
        a_world(monkeypatch, rank="0")

        def fail(backend: str) -> float:
            raise torch.distributed.DistNetworkError("the client socket\nhas timed out")

        monkeypatch.setattr(world, "round_trip", fail)
    elif name == "driver":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(machine.shutil, "which", lambda program: f"/usr/bin/{program}")


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("disk", "1.0 GB are free at"),
        ("memory", "0.5 GB of memory are free"),
        ("read-only", "cannot be written to"),
        ("missing", "accelerate is not installed"),
        ("old", "is not what tiltune is made for (torch>=99)"),
        ("broken", "a package does not load"),
        ("half a world", "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ("crowded", "2 processes share 1 GPUs"),
        ("no answer", "the client socket has timed out"),
        ("driver", "torch sees no GPU"),
    ],
)
def test_each_illness_has_its_sentence(
    tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, says: str
) -> None:
    ill(name, monkeypatch, tmp_path)
    shown = tiltune("doctor")
    assert shown.status == 1 and "healthy" not in shown.out
    wrong = [line for line in shown.out.splitlines() if line.startswith("wrong")]
    assert wrong and all(says in line for line in wrong)


@pytest.mark.usefixtures("no_processes")
def test_only_rank_0_reports_and_every_rank_says_what_is_wrong_with_it(
    tiltune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_world(monkeypatch, rank="1")
    monkeypatch.setattr(world, "round_trip", lambda backend: 0.001)
    assert tiltune("doctor")[:2] == (0, "")
    monkeypatch.setattr(doctor, "threads", lambda: Finding("threads", "none", "there are none."))
    assert tiltune("doctor")[:2] == (1, "wrong on rank 1: there are none.\n")


def test_requirements_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    lines = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    monkeypatch.setattr(packages.metadata, "requires", lambda name: [*lines, 'peft>=0.18; extra == "lora"'])
    needs = packages.requirements()
    assert "peft" not in needs
    assert all(packages.satisfies(packages.installed(name) or "", needs[name]) for name in packages.PACKAGES)
    assert not packages.satisfies("1.0", needs["torch"]) and packages.satisfies("99.0.dev1+cpu", needs["torch"])
