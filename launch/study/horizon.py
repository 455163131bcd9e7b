"""Trust-PCL over d steps: what does a short horizon cost in bias, and save in variance (arXiv 2509.01632, question 1)?

The problems are those of the study of dimensions. Every run draws the same population, learns the same soft value on it, and then
as many on-policy updates from the prior on, so that all spend the same energy calls; they differ in the horizon alone. The whole
path needs no value but log Z. The value is judged by its closed form, the density ratio of the tilted and the prior mixture, on
paths of the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...finetune.learning.trainer import TrainState
from ...tasks.random_mixture import random_mixture
from .horizon_answer import KEYS, answer, figure
from .methods import LEARNING_RATE, LOG_Z_LEARNING_RATE
from .problem import Problem, problem_of
from .study import Size, Study, plain
from .table import Row
from .training import from_the_prior, trained


@dataclass(frozen=True)
class Settings:
    """horizons: in steps; 0 for the whole path. ess: effective share of the prior. value_updates: of the soft value, on
    ``population`` prior paths."""

    dims: tuple[int, ...] = (2, 10)
    horizons: tuple[int, ...] = (1, 5, 50, 0)
    ess: float = 0.05
    steps: int = 100
    population: int = 4000
    value_updates: int = 600
    updates: int = 40
    batch_size: int = 80
    samples: int = 500
    seeds: int = 5


SIZES: dict[Size, Settings] = {
    "quick": Settings(horizons=(1, 10, 0), steps=20, population=1000, value_updates=100, updates=10, seeds=2),
    "default": Settings(),
    "full": Settings(
        dims=(2, 10, 50), horizons=(1, 5, 20, 50, 0), population=14_000, value_updates=2000, updates=200, samples=2000, seeds=10
    ),
}
METRICS = {
    "gap": "gap (nats)",
    "component_tv": "component TV",
    "log_z_error": "abs. log Z error (nats)",
    "ess_share": "ESS over the exact denoiser's",
    "value_error": "RMS error of the value over its spread",
    "value_error_before": "the same, of the population's value",
    "diverged": "diverged",
    "calls": "energy calls",
}


@dataclass(frozen=True)
class Run:
    """One horizon on one problem."""

    dim: int
    horizon: int
    seed: int
    settings: Settings


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    runs = {
        f"D{dim:03d}-seed{seed:02d}-horizon{horizon:03d}": Run(dim, horizon, seed, settings)
        for seed in range(settings.seeds)
        for dim in settings.dims
        for horizon in settings.horizons
    }
    return Study("horizon", plain(settings), runs, perform, KEYS, METRICS, answer, figure)


def perform(run: Run) -> list[Row]:
    """One row."""
    settings = run.settings
    problem = problem_of(run.dim, settings.ess, run.seed, settings.steps, settings.samples)
    config = from_the_prior(
        run.seed,
        settings.updates,
        settings.batch_size,
        LEARNING_RATE,
        objective="trust_pcl",
        horizon=run.horizon or None,
        log_z_learning_rate=LOG_Z_LEARNING_RATE,
        soft_value_updates=settings.value_updates,
        population="importance",
        population_size=settings.population,
    )
    [found], state = trained(problem, config, (config.updates,))
    known = {"gap_prior": problem.gap_prior, "gap_exact": problem.gap_exact}
    return [{"dim": run.dim, "horizon": run.horizon, "seed": run.seed, **found, **_value_errors(problem, state), **known}]


def _value_errors(problem: Problem, state: TrainState) -> Row:
    """Root mean square error of the learned log h + log Z on the target's paths, over the standard deviation of the closed
    form: of the value that learned with the policy, and of the one that it began as."""
    paths, chain = problem.exact.paths, problem.prior.chain
    truth = torch.stack([log_h(problem, paths.states[k], k) for k in chain.trained]) + problem.log_z
    soft_value = state.preparation.soft_value
    assert soft_value is not None
    before = soft_value.along(paths, problem.prior) + problem.log_z
    learned = state.config.horizon is not None
    after = state.critic(paths, 1.0) + state.log_z.values()[0] if learned else before

    def error(value: Tensor) -> float:
        return ((value - truth).square().mean().sqrt() / truth.std()).item()

    return {"value_error": error(after), "value_error_before": error(before)}


def log_h(problem: Problem, state: Tensor, k: int) -> Tensor:
    """log of the density of the tilted mixture over the prior's, both noised as at step ``k`` [N]: the soft value less log Z, but
    for what K steps differ from the diffusion itself."""
    chain = problem.prior.chain
    prior = random_mixture(state.shape[1], problem.seed)
    tilted, own = (
        law.component_log_density(state.double(), chain.signal[k], chain.noise[k])[0].logsumexp(1)
        for law in (problem.target, prior)
    )
    return (tilted - own).float()
