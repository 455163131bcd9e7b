"""The gradient in two passes against the naive graph, in time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...finetune.config.train import TrainConfig
from ...finetune.learning.gradients import chunk_rows
from ...samplers.rollout import rollout
from .case import make_case
from .memory import KeptBytes, allocator_peak
from .timing import in_turn
from .updates import ignore, naive_update, two_pass_update

NAIVE_STEPS = (20, 80, 320)


def two_pass_against_naive(batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time and both peaks of both updates at each number of steps."""
    rows: list[dict[str, Any]] = []
    generator = torch.Generator(device).manual_seed(0)
    for steps in NAIVE_STEPS:
        case = make_case("mlp", steps, batch, device)
        probe = rollout(case.prior, case.policy, batch, generator)
        chunk = chunk_rows(case.policy, case.prior.chain, probe, TrainConfig().memory_mb)
        runs: dict[str, Callable[[Callable[[Tensor], None]], None]] = {
            "two_pass": lambda see, case=case, chunk=chunk: two_pass_update(case, generator, chunk, see),
            "naive": lambda see, case=case: naive_update(case, generator, see),
        }
        row: dict[str, Any] = {"network": case.name, "steps": steps, "batch": batch, "chunk": chunk}
        seconds = in_turn({key: lambda run=run: run(ignore) for key, run in runs.items()}, rounds, device)
        row["time_ratio"] = statistics.median(a / b for a, b in zip(seconds["two_pass"], seconds["naive"], strict=True))
        states_bytes = 4 * (steps + 1) * batch * torch.Size(case.prior.shape).numel()
        for key, run in runs.items():
            with KeptBytes(case.weights) as kept:
                run(kept.ignore)
            row[f"{key}_s"] = statistics.median(seconds[key])
            row[f"{key}_kept_mb"] = kept.peak / 2**20
            row[f"{key}_allocated_mb"] = (allocator_peak(lambda run=run: run(ignore), device) - states_bytes) / 2**20
        for kind in ("kept", "allocated"):
            row[f"naive_over_two_pass_{kind}"] = row[f"naive_{kind}_mb"] / row[f"two_pass_{kind}_mb"]
            first = (rows[0] if rows else row)[f"two_pass_{kind}_mb"]
            row[f"over_first_{kind}"] = row[f"two_pass_{kind}_mb"] / first
        rows.append(row)
    return rows
