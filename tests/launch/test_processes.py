"""Two processes over gloo are one run: one batch, one checkpoint, one end."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ENERGY = """
import os, pathlib, signal
import torch

asked = []

def ink(x):
    asked.append(len(x))
    stop = pathlib.Path(__file__).with_name("stop")
    if stop.exists() and os.environ.get("RANK") == "1" and len(asked) == 6:
        os.kill(os.getpid(), int(stop.read_text()))
    return x.flatten(1).mean(1)
"""
CONFIG = """
prior: {{source: {prior}, steps: 4}}
energy: {{terms: ["{folder}/ink.py:ink"]}}
train: {{objective: log_variance, behavior: {{on_policy: 1.0}}, bank_size: 32, warm_start_updates: 4, warm_start_rows: 16,
         updates: 6, batch_size: 8, ema_decay: 0.9, checkpoint_every: 3}}
device: cpu
"""


@pytest.fixture(scope="module")
def found(in_two_processes: Any) -> list[dict[str, Any]]:
    """What `two_processes.py` found in each of two processes."""
    return in_two_processes("two_processes.py", 240)


def test_two_times_four_trajectories_give_the_gradient_of_eight(found: Any) -> None:
    """Every objective, in chunks of another size, log Z and loss among it: to 1e-6; a gradient that is not shared does not."""
    for process in found:
        for name, difference in process["gradients"].items():
            assert difference > 0.1 if name.endswith("not shared") else difference < 1e-6, name


def test_the_same_noise_is_detected(found: Any) -> None:
    for process in found:
        assert process["same noise"] == [
            "ProcessError: two processes draw the same noise: their generators have one seed.",
            "nothing was raised",
        ]


def test_weights_that_drifted_apart_are_detected(found: Any) -> None:
    for process in found:
        assert "drifted apart" in process["diverged"][0] and process["diverged"][1] == "nothing was raised"


def test_a_size_that_cannot_be_shared_evenly_is_refused(found: Any) -> None:
    assert all("give a multiple of 2" in process["uneven"] for process in found)


@pytest.mark.parametrize(("kind", "says"), [("exception", "the scorer is gone"), ("shape", "returned shape")])
def test_a_failure_of_one_process_stops_both_at_the_same_step_with_a_checkpoint(found: Any, kind: str, says: str) -> None:
    first, second = (process[kind] for process in found)
    assert first["raised"] == "ProcessError: process 1 failed, and all stop with it; its own output says why."
    assert second["raised"].startswith("EnergyError") and says in second["raised"]
    assert first["steps"] == second["steps"] == first["kept"] == second["kept"] > 0


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_energies_without_meaning_in_one_process_are_masked_in_both(found: Any, kind: str) -> None:
    """Within what ``max_invalid`` admits: both go on to the same end."""
    assert [process[kind] for process in found] == [{"raised": "nothing was raised", "steps": 8, "kept": 8}] * 2


def test_one_process_that_is_asked_to_stop_stops_both(found: Any) -> None:
    first, second = (process["stop"] for process in found)
    assert first == second and first["preempted"] and 4 < first["steps"] == first["kept"] < 8


def test_resumed_on_as_many_processes_it_is_the_same_run(found: Any) -> None:
    for process in found:
        assert process["resume"]["steps"] == list(range(1, 9)) and all(process["resume"]["equal"])
    assert found[0]["resume"]["calls"] == 4 + 4 + 40 + 4 * 8, "the counts are those of both processes"


def test_resumed_on_another_number_it_says_what_is_no_longer_exact(found: Any) -> None:
    (warning,) = found[0]["resume"]["warned"]
    assert "was on 1 processes and goes on with 2: the noise is another one" in warning
    assert not found[1]["resume"]["warned"]
    assert all(process["resume"]["other ended"] == 8 for process in found)


# --- by the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(prior: Path, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("command")
    (folder / "ink.py").write_text(ENERGY)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, prior=prior))
    return folder


@pytest.fixture(scope="module")
def launch(folder: Path, environment: dict[str, str]) -> Any:
    def run(out: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tiltune", "launch", "--cpu", "--nproc", "2", "--", "train"]
        command += ["--config", str(folder / "run.yaml"), "--out", str(folder / out), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)

    return run


def test_sigterm_on_rank_1_saves_one_step_ends_with_75_and_goes_on_bit_for_bit(folder: Path, launch: Any) -> None:
    whole = launch("whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert whole.stdout.count("written to") == 1
    (folder / "stop").write_text(str(int(signal.SIGTERM)))
    stopped = launch("run")
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    assert stopped.stderr.count("--resume auto goes on") == 1
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["preempted"] and 0 < record["updates"] < 6
    (folder / "stop").unlink()
    resumed = launch("run", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in ("metrics.jsonl", "policy/diffusion_pytorch_model.safetensors"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
