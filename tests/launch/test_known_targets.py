"""The tasks with a known truth in many dimensions through the verbs, on short chains; their verdicts are not what is tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SIZES = ["--population-size", "200", "--warm-start-updates", "4", "--warm-start-rows", "64", "--updates", "2"]
SMALL = [*SIZES, "--batch-size", "8", "--steps", "12", "--certificate-size", "400", "--device", "cpu"]
TASKS: dict[str, tuple[list[str], int, str]] = {
    # flags, dimension, a figure of the certificate
    "mixture": (["--dim", "3", "--energy", "quadratic(ess=0.2)"], 3, "component_tv"),
    "manywell": (["--dim", "4"], 4, "well_tv"),
    "funnel": ([], 10, "depth_tv"),
    "dw4": ([], 6, "distance_tv"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_trained_judged_drawn_and_sampled(tiltune: Callable[..., Any], tmp_path: Path, task: str) -> None:
    given, dim, figure = TASKS[task]
    out = tmp_path / "run"
    assert tiltune("train", task, *given, *SMALL, "--out", out).status == 0
    shown = tiltune("evaluate", out)
    certificate = json.loads((out / "certificate.json").read_text())
    assert shown.status == certificate["exit_status"] and certificate["judged_by"] == f"the task {task}", shown.err
    assert 0 <= certificate[figure] <= 1 and 0 < certificate[f"{figure}_exact"] < 0.2
    # The exact denoiser's paths are in no budget: what is not the policy's is the prior's and, where it climbs, the target's.
    calls = certificate["certificate_energy_calls_by_side"]
    assert calls["policy"] == 400 + 128 * 8
    assert certificate["certificate_energy_calls"] == sum(calls.values())
    assert calls["prior and target"] == 400 or certificate["target_side"] == "smc"
    assert (out / "picture.png").stat().st_size > 10_000
    assert tiltune("sample", out, "--n", 7, "--out", tmp_path / "x.safetensors").status == 0
    [samples] = load_file(tmp_path / "x.safetensors").values()
    assert samples.shape == (7, dim)
    shown = tiltune("export", out, "--format", "pipeline", "--out", tmp_path / "exported")
    assert shown.status == 2 and "no class of diffusers is" in shown.err


def test_an_interrupted_run_goes_on_bit_for_bit(tiltune: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["mixture", "--dim", "2", *SMALL, "--checkpoint-every", "2"]
    for name in ("whole", "resumed"):
        assert tiltune("train", *flags, "--out", tmp_path / name).status == 0
    (tmp_path / "resumed" / "run.json").unlink()
    last = (tmp_path / "resumed" / "checkpoints" / "last").read_text().strip()
    assert last.startswith("step-")
    assert tiltune("train", *flags, "--out", tmp_path / "resumed", "--resume", "auto").status == 0
    first, second = (
        load_file(tmp_path / name / "policy/residual/diffusion_pytorch_model.safetensors") for name in ("whole", "resumed")
    )
    assert all((first[key] == second[key]).all() for key in first)


def test_what_does_not_fit_is_refused_in_a_sentence(tiltune: Callable[..., Any], tmp_path: Path) -> None:
    for flags, said in (
        (["digits", "--dim", "3"], "the task digits has one prior, of one dimension; leave out the dim 3."),
        (["funnel", "--dim", "3"], "the task funnel has one prior"),
        (["mixture", "--energy", "linear(ess=0.1)"], "choose one with --dim."),
        (["mixture", "--dim", "0"], "dim is 0; it is at least 1."),
        (["mixture", "--dim", "2", "--chain", "flow"], "fixes chain; choose dim and seed and steps alone."),
        (["manywell", "--dim", "3"], "an even number from 2 on, not 3."),
        (["--prior", "x", "--energy", "a.py:b", "--dim", "3"], "dim is 3, which asks for the prior of a shipped task"),
    ):
        shown = tiltune("train", *flags, "--out", tmp_path / "run")
        assert shown.status == 2 and said in shown.err, (flags, shown.err)
    shown = tiltune("train", "mixture", "--dim", "2", "--prior-seed", "3", "--print-config")
    assert shown.status == 0 and "linear(ess=0.003, seed=3)" in shown.out
