"""What a training of a large network will need of memory, measured in part and computed in part before it begins."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ...samplers.denoiser import evaluate
from ...samplers.log_ratio import rows_of
from ...samplers.rollout import draw_start, step
from ...samplers.trajectory import Trajectories, rows_at_once
from .behaviors import needs_population
from .gradients import backward_rows, chunk_rows
from .preparation import held_out_size
from .state import TrainState

LARGE = 10_000_000  # weights of the network from which on a training says what it needs
COPIES = 6  # of what is trained: gradient, two moments of Adam, running average, two best states so far
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for. Where the device is a CPU, of the whole process, else of torch on the device."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{size / 2**30:.1f} {name}" for name, size in self.parts.items() if size > 2**26)
        bounds = "--memory-mb bounds that of a chunk, --batch-size and --population-size that of paths"
        return f"memory: about {self.total / 2**30:.1f} GB at the peak ({listed}); {bounds}"


def estimate_memory(state: TrainState) -> MemoryEstimate | None:
    """What the updates of this training will hold at their peak; None for a small network, one in shards, and where the system
    does not tell.

    One chunk of the second pass, one of the warm start's teacher, one step of a rollout and one decoding are run on noise to see
    what they take. A process on a CPU keeps some of what it has freed, so all are counted from where the first began. What the
    energy takes is not in it, nor the layers of a population that climbs.
    """
    prior, config = state.prior, state.config
    weights = sum(weight.numel() for weight in state.policy.parameters())
    if weights < LARGE or state.processes.sharded or not _tells(prior.device):
        return None
    here = _begin(prior.device)
    _run_chunk(state)
    if config.warm_start == "value_drift":
        _run_teacher(state)
    _run_step(state)
    _run_decoding(state)
    peak = _peak(prior.device) - here
    path = 4 * (prior.chain.num_steps + 1) * math.prod(prior.shape)
    population = state.size["population_size"] if needs_population(config) else 0
    outputs = 2 if config.soft_value_updates else 1  # the soft value is learned from what the prior said along the paths
    trained = sum(weight.numel() * weight.element_size() for weight in state.policy.parameters() if weight.requires_grad)
    return MemoryEstimate(
        {
            "networks and libraries": here,
            "paths of the population": path * (population * outputs + held_out_size(prior, population, state.processes.count)),
            "paths of an update": path * state.size["batch_size"] * (2 if config.epochs > 1 else 1),
            "gradients, moments and copies of what is trained": COPIES * trained,
            "one chunk, step or decoding": max(0, peak),
        }
    )


def _run_chunk(state: TrainState) -> None:
    """The forward and backward pass of one chunk of the second pass."""
    prior, policy = state.prior, state.wrapped
    paths = _noise(state, min(6, max(2, state.size["batch_size"])))
    with state.processes.no_sync(policy):
        total = prior.chain.num_kernels * state.size["batch_size"]
        rows = chunk_rows(policy, prior.chain, paths, state.config.memory_mb, total=total)
        found = rows_of(paths, prior.chain, slice(0, rows))
        backward_rows(policy, prior.chain, *found[:3], torch.zeros(len(found[0]), device=prior.device), found[3])
    for weight in state.policy.parameters():
        weight.grad = None


def _run_teacher(state: TrainState) -> None:
    """The gradient through the prior that a chunk of `ValueDrift` takes."""
    prior, config, rows = state.prior, state.config, state.size["warm_start_rows"]
    paths = _noise(state, 6)
    with state.processes.no_sync(state.wrapped):
        count = chunk_rows(state.wrapped, prior.chain, paths, config.memory_mb, rows, total=rows)
    following, _, step, condition = rows_of(paths, prior.chain, slice(0, count))
    following = following.clone().requires_grad_(True)
    torch.autograd.grad(evaluate(prior.denoiser, prior.chain, following, step, condition).sum(), following)


def _run_step(state: TrainState) -> None:
    """One denoising step of a rollout, or of as many states as stored ones are evaluated at once (`StepBound`, `HeldOut`)."""
    prior = state.prior
    paths = _noise(state, max(state.size["batch_size"], rows_at_once(prior.shape, prior.device)), states=1)
    step(prior, state.wrapped, paths.states[0], prior.chain.trained[0], paths.states[0], paths.condition)


def _run_decoding(state: TrainState) -> None:
    """Samples of a batch's last states."""
    state.prior.to_data(_noise(state, state.size["batch_size"], states=1).states[0])


def _noise(state: TrainState, count: int, states: int | None = None) -> Trajectories:
    prior = state.prior
    generator = torch.Generator(device=prior.device).manual_seed(0)
    start = draw_start(prior, count, generator)
    return Trajectories(start.expand(states or prior.chain.num_steps + 1, *start.shape), condition=prior.condition(count))


# --- what the system says ------------------------------------------------------------------------------------------------


def _tells(device: torch.device) -> bool:
    return device.type == "cuda" or (STATUS.exists() and os.access(RESET, os.W_OK))


def _now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _begin(device: torch.device) -> int:
    """Forget earlier peaks; returns what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        RESET.write_text("5")
    return _now(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
