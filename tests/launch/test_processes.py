"""Two processes over gloo are one run: one batch, one checkpoint, one end."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiltune.finetune.learning.objective_table import OBJECTIVES

ENERGY = """
import os, pathlib, signal, time
import torch

asked = []

def ink(x):
    asked.append(len(x))
    stop = pathlib.Path(__file__).with_name("stop")
    if stop.exists() and os.environ.get("RANK") == "1":
        call, what = stop.read_text().split()
        if len(asked) == int(call):
            time.sleep(1000) if what == "hang" else os.kill(os.getpid(), int(what))
    return x.flatten(1).mean(1)
"""
CONFIG = """
prior: {{source: {prior}, steps: 4}}
energy: {{terms: ["{folder}/ink.py:ink"]}}
train: {{objective: log_variance, behavior: {{on_policy: 1.0}}, population_size: 32, population: importance,
         warm_start_updates: 4, warm_start_rows: 16,
         updates: 6, batch_size: 8, ema_decay: 0.9, checkpoint_every: 3}}
device: cpu
"""


@pytest.fixture(scope="module")
def found(in_two_processes: Any) -> list[dict[str, Any]]:
    """What `two_processes.py` found in each of two processes."""
    return in_two_processes("two_processes.py", 240)


def test_1x8_2x4_and_4x2_give_the_same_gradients_and_loss(found: Any) -> None:
    """Eight trajectories in one process, four in each of two, and these in two accumulated passes: every objective, log Z's
    gradient among it, of one condition and of two, to 1e-6; a gradient that is not shared does not."""
    for process in found:
        assert len(process["gradients"]) == 3 * (len(OBJECTIVES) + 1) * 2  # and one with a horizon
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


def test_the_value_of_a_horizon_is_one_on_both(found: Any) -> None:
    """Each has learned another soft value, on its own paths; what learns with the policy is one value."""
    for process in found:
        assert process["critic"]["apart"] == 0 < 0.1 < process["critic"]["populations"]
        assert process["reused"]["apart"] == 0 < 1e-4 < process["reused"]["moved"]


def test_a_size_that_cannot_be_shared_evenly_is_refused(found: Any) -> None:
    assert all("give a multiple of 2" in process["uneven"] for process in found)


def test_in_shards_the_gradient_is_the_same(found: Any) -> None:
    """FSDP2, of many units and of one, with gradient checkpointing; with half of the weights a process."""
    for process in found:
        shards = process["shards"]
        assert shards["units"] > 10
        assert all(0.45 < shards[f"{name} held"] < 0.55 for name in ("many", "one", "checkpointed"))
        assert all(shards[name] < 1e-6 for name in ("many", "one", "checkpointed")) and shards["whole"] < 1e-5
        assert shards["control"] > 0.1


def test_shards_are_collected_into_a_whole_policy(found: Any) -> None:
    for process in found:
        assert process["collected"]["after"] == 0 < 0.01 < process["collected"]["before"]


def test_what_cannot_be_sharded_is_refused(found: Any) -> None:
    for process in found:
        lora, residual, layout, version, offload = process["refused"]
        assert "this one is lora" in lora and "this one is residual" in residual and "channels-last" in layout
        assert "set fsdp_version: 2" in version and "FSDP_OFFLOAD_PARAMS is true" in offload


@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_the_export_of_a_distributed_training_is_the_live_policy(found: Any, wrapped: str) -> None:
    for process in found:
        assert process["exported"][wrapped]["exported"] < 1e-6 < 1e-3 < process["exported"][wrapped]["moved"]
        # The same training, in passes that are as many on both.
        assert process["exported"][wrapped]["live"] == pytest.approx(found[0]["exported"]["ddp"]["live"], abs=1e-3)
        assert process["exported"][wrapped]["chunk"] == found[0]["exported"]["ddp"]["chunk"] < 16


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("exception", "EnergyError: energy energy of two_processes.py raised RuntimeError on line"),
        ("shape", "EnergyError: energy energy of two_processes.py returned shape"),
        ("decoder", "MemoryError: out of memory"),
    ],
)
def test_a_failure_of_one_process_stops_both_at_the_same_step_with_a_checkpoint(found: Any, kind: str, says: str) -> None:
    first, second = (process[kind] for process in found)
    assert first["raised"] == "ProcessError: process 1 failed, and all stop with it; its own output says why."
    assert second["raised"].startswith(says)
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
    assert found[0]["resume"]["calls"] == 12 + 12 + 40 + 10 + 4 * 8 + 256, "the counts are those of both processes"


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
    def run(out: str, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tiltune", "launch", "--cpu", "--nproc", "2", *options, "--", "train"]
        command += ["--config", str(folder / "run.yaml"), "--out", str(folder / out), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)

    return run


@pytest.fixture(scope="module")
def whole(folder: Path, launch: Any) -> Path:
    """The run that nobody stops."""
    ran = launch("whole")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("written to") == 1
    return folder / "whole"


def assert_the_same(run: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "policy/diffusion_pytorch_model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_stopped_on_one_process_the_run_goes_on_bit_for_bit(folder: Path, launch: Any, whole: Path) -> None:
    """SIGTERM on rank 1, in its ninth energy: one step is saved by both, and the status is 75."""
    (folder / "stop").write_text(f"9 {int(signal.SIGTERM)}")
    stopped = launch("run")
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    assert stopped.stderr.count("--resume auto goes on") == 1
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["preempted"] and record["updates"] == 2
    (folder / "stop").unlink()
    resumed = launch("run", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_the_same(folder / "run", whole)


@pytest.mark.slow
def test_a_hang_of_one_process_ends_the_run_in_time_and_it_goes_on_bit_for_bit(folder: Path, launch: Any, whole: Path) -> None:
    """Rank 1 sleeps in its energy. Process 0 waits for the stated time and ends; torchrun kills the other 30 s later."""
    (folder / "stop").write_text("9 hang")
    hung = launch("hung", "--process-timeout", "4")
    (folder / "stop").unlink()
    assert hung.returncode == 1 and "another process did not answer for 4 s" in hung.stderr, hung.stderr[-2000:]
    assert json.loads((folder / "hung" / "run.json").read_text())["stopped"].startswith("NoAnswer")
    resumed = launch("hung", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_the_same(folder / "hung", whole)


@pytest.mark.slow
def test_in_shards_a_run_is_the_same_but_for_rounding_and_goes_on_bit_for_bit(
    folder: Path, launch: Any, whole: Path, environment: dict[str, str]
) -> None:
    sharded = launch("sharded", options=("--fsdp",))
    assert sharded.returncode == 0, sharded.stderr[-2000:]
    theirs, ours = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (whole, folder / "sharded")
    )
    assert [line["energy_calls"] for line in ours] == [line["energy_calls"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-3)
    # As if it had been killed after its sixth step.
    shutil.copytree(folder / "sharded", folder / "killed")
    kept = folder / "killed" / "checkpoints"
    (folder / "killed" / "run.json").unlink()
    shutil.rmtree(kept / "step-00000009")
    (kept / "last").write_text("step-00000006\n")
    resumed = launch("killed", "--resume", "auto", options=("--fsdp",))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "after 6 steps" in resumed.stdout
    assert_the_same(folder / "killed", folder / "sharded")
    # On one process, and whole again: it says what is no longer exact, and counts on.
    shutil.copytree(folder / "killed", folder / "alone")
    (folder / "alone" / "run.json").unlink()
    shutil.rmtree(folder / "alone" / "checkpoints" / "step-00000009")
    (folder / "alone" / "checkpoints" / "last").write_text("step-00000006\n")
    command = [sys.executable, "-m", "tiltune", "train", "--config", str(folder / "run.yaml"), "--out", str(folder / "alone")]
    alone = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True, timeout=240, env=environment)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert "the run was on 2 processes and goes on with 1" in alone.stderr
    last = json.loads((folder / "alone" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["energy_calls"] == theirs[-1]["energy_calls"]
