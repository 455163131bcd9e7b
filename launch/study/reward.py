"""What is the reward: r = -E, or r = exp(-E) (the figure of arXiv 2509.01632, its chain and its energy)?

Energies are often given as a density R = exp(-E), and KL-regularized RL maximizes a reward. Whoever passes R for the reward aims
at p_prior · exp(R / alpha), not at p_prior · R^(1/alpha): exponentiated twice. The task in the plane, 25 modes to nine, on the
Brownian chain of arXiv 2405.20971. Both rewards with on-policy REINFORCE-KL and with RTB from the same noise, and ddpo, which has
no KL at all. All are measured against the target, which is that of r = -E.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...samplers.policy import Policy
from ...tasks.mixture_target import energy
from .problem import Problem, measure, plane_problem, rollouts, w2_ratio
from .reward_answer import BINS, KEYS, REACH, answer, figure
from .study import Size, Study, plain
from .table import Row
from .training import from_the_prior, trained


def exponentiated_twice(x: Tensor) -> Tensor:
    """The energy of whoever takes the density exp(-E) for the reward."""
    return -(-energy(x)).exp()


METHODS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "reinforce_kl, r = -E": ({"objective": "reinforce_kl"}, energy),
    "reinforce_kl, r = exp(-E)": ({"objective": "reinforce_kl"}, exponentiated_twice),
    "rtb, r = -E": ({"objective": "rtb"}, energy),
    "rtb, r = exp(-E)": ({"objective": "rtb"}, exponentiated_twice),
    "ddpo, r = -E": ({"objective": "ddpo"}, energy),
}


@dataclass(frozen=True)
class Settings:
    """updates: after which a training is measured, within one training."""

    chain: str = "brownian"
    steps: int = 100
    updates: tuple[int, ...] = (25, 50, 100, 200)
    batch_size: int = 128
    learning_rate: float = 3e-3
    samples: int = 2000
    seeds: int = 5


SIZES: dict[Size, Settings] = {
    "quick": Settings(steps=20, updates=(4, 8), batch_size=64, samples=300, seeds=2),
    "default": Settings(),
    "full": Settings(updates=(100, 200, 400, 800), batch_size=512, samples=5000, seeds=10),
}
METRICS = {
    "mode_tv": "mode TV",
    "w2_ratio": "W2 over that of exact samples",
    "gap": "gap (nats)",
    "diverged": "diverged",
    "calls": "energy calls",
}


@dataclass(frozen=True)
class Run:
    """One method with one reward."""

    method: str
    seed: int
    settings: Settings


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    runs = {
        f"seed{seed:02d}-{''.join(letter if letter.isalnum() else '-' for letter in method)}": Run(method, seed, settings)
        for seed in range(settings.seeds)
        for method in METHODS
    }
    return Study("reward", plain(settings) | {"methods": list(METHODS)}, runs, perform, KEYS, METRICS, answer, figure)


def perform(run: Run) -> list[Row]:
    """A row for each number of updates."""
    settings = run.settings
    problem = plane_problem(settings.chain, settings.steps, run.seed, settings.samples)
    changes, own_energy = METHODS[run.method]
    # On-policy alone, coverage hangs on how slowly the temperature falls; ddpo has none.
    changes = {"log_z_learning_rate": 0.1, "tempering_ess": None if changes["objective"] == "ddpo" else 0.6} | changes
    config = from_the_prior(run.seed, settings.updates[-1], settings.batch_size, settings.learning_rate, **changes)
    rows, _ = trained(problem, config, settings.updates, look, own_energy)
    known = {"gap_prior": problem.gap_prior, "gap_exact": problem.gap_exact}
    own = {"method": run.method, "seed": run.seed, **known}
    return [{"updates": updates, **own, **row} for updates, row in zip(settings.updates, rows, strict=True)]


def look(problem: Problem, policy: Policy) -> Row:
    """`measure`, W2, and a histogram of samples: counts in `BINS` x `BINS` squares of [-`REACH`, `REACH`]², row by row."""
    paths, log_weight = rollouts(problem, policy)
    found = measure(problem, policy, (paths, log_weight))
    x = problem.prior.to_data(paths.terminal).double()
    counts, _ = torch.histogramdd(x, [BINS, BINS], range=[-REACH, REACH, -REACH, REACH])
    histogram = [int(count) for count in counts.flatten()]
    return {**found, "mode_tv": found["component_tv"], "w2_ratio": w2_ratio(problem, policy), "histogram": histogram}
