"""What does the temperature trade: energy, KL to the prior, diversity (arXiv 2509.01632 fixes it)?

At each alpha a policy is trained toward p_prior · exp(-E/alpha). Its mean energy, its KL to the prior over paths in nats, and the
mean distance between two of its samples are compared with those of the tilted law, which are exact. The KL is the sum of
½ |delta_k|² over the policy's own steps: its expectation given the states, without the noise of the log-ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...samplers.log_ratio import outputs, shift_moments
from ...samplers.policy import Policy
from ...samplers.streams import stream
from .problem import Problem, measure, problem_of, rollouts
from .study import Size, Study, plain
from .table import Row
from .temperature_answer import KEYS, answer, figure
from .training import from_the_prior, trained


@dataclass(frozen=True)
class Settings:
    """alphas: temperatures; at 1, ``ess`` of the prior is effective."""

    dims: tuple[int, ...] = (2, 10)
    alphas: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
    ess: float = 0.05
    steps: int = 50
    updates: int = 60
    epochs: int = 4
    batch_size: int = 80
    learning_rate: float = 3e-3
    samples: int = 1000
    seeds: int = 5


SIZES: dict[Size, Settings] = {
    "quick": Settings(dims=(2,), alphas=(0.7, 1.0, 2.0), steps=20, updates=8, epochs=2, seeds=2, samples=300),
    "default": Settings(),
    "full": Settings(dims=(2, 10, 50), updates=240, samples=4000, seeds=10),
}
METRICS = {
    "energy": "mean energy",
    "energy_exact": "of the target",
    "kl": "KL to the prior (nats)",
    "kl_exact": "of the target",
    "diversity": "mean distance of two samples",
    "diversity_exact": "of the target",
    "gap": "gap (nats)",
    "diverged": "diverged",
    "calls": "energy calls",
}


@dataclass(frozen=True)
class Run:
    """One temperature on one problem."""

    dim: int
    alpha: float
    seed: int
    settings: Settings


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    runs = {
        f"D{dim:03d}-seed{seed:02d}-alpha{alpha:g}": Run(dim, alpha, seed, settings)
        for seed in range(settings.seeds)
        for dim in settings.dims
        for alpha in settings.alphas
    }
    return Study("temperature", plain(settings), runs, perform, KEYS, METRICS, answer, figure)


def perform(run: Run) -> list[Row]:
    """One row."""
    settings = run.settings
    problem = problem_of(run.dim, settings.ess, run.seed, settings.steps, settings.samples, run.alpha)
    own = {"alpha": run.alpha, "epochs": settings.epochs, "tempering_ess": 0.3}
    config = from_the_prior(run.seed, settings.updates, settings.batch_size, settings.learning_rate, **own)
    [found], _ = trained(problem, config, (settings.updates,), look)
    return [{"dim": run.dim, "alpha": run.alpha, "seed": run.seed, **found, **truth(problem), "gap_prior": problem.gap_prior}]


@torch.no_grad()
def look(problem: Problem, policy: Policy) -> Row:
    """`measure`, and energy, KL and diversity of the policy."""
    prior = problem.prior
    paths, log_weight = rollouts(problem, policy)
    _, kl = shift_moments(prior.chain, policy, paths, outputs(prior.chain, prior.denoiser, paths))
    x = prior.to_data(paths.terminal)
    own = {"energy": problem.energy(x).mean().item(), "kl": kl.mean().item(), "diversity": mean_distance(x)}
    return {**measure(problem, policy, (paths, log_weight)), **own}


def truth(problem: Problem) -> Row:
    """Of the tilted law, as of infinitely many steps: by exact samples, and the KL as -log Z - E[E]/alpha."""
    x = problem.target.sample(20 * problem.samples, stream("reference", problem.seed))
    energy = problem.energy(x).mean().item()
    kl = -problem.log_z_ideal - energy / problem.alpha
    return {"energy_exact": energy, "kl_exact": kl, "diversity_exact": mean_distance(x[: 2 * problem.samples])}


def mean_distance(x: Tensor) -> float:
    """Between two different samples."""
    return torch.pdist(x.double()).mean().item()
