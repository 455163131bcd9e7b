"""Does the gap between on-policy and off-policy methods widen with the dimension (left open by arXiv 2509.01632)?

Random Gaussian mixtures of a growing dimension with their exact denoiser, tilted by a linear energy that leaves the same share of
the prior effective in each. A run is one method on one problem: it trains at each of several budgets of energy calls, from the
prior on, and each of these trainings is measured at its end, with its schedule complete. What is measured where no call is spent
is the prior. Two more are no trainings: populations by their weights alone. The seed changes problem and training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from ...finetune.config.train import TrainConfig
from .dimension_answer import answer
from .dimension_figure import figure
from .methods import METHODS, PRIOR, PROBE, WEIGHTED, prepared, train_config
from .problem import Problem, measure, measure_weighted, problem_of
from .study import Size, Study, plain
from .table import Row
from .training import Evaluations, trained


@dataclass(frozen=True)
class Settings:
    """ess: effective shares of the prior. steps: K. updates: of an on-policy training, at each budget. samples: rollouts by which
    a policy is measured."""

    dims: tuple[int, ...] = (2, 5, 10, 50, 100)
    ess: tuple[float, ...] = (0.05,)
    steps: int = 50
    batch_size: int = 80
    updates: tuple[int, ...] = (10, 30)
    samples: int = 500
    seeds: int = 5


SIZES: dict[Size, Settings] = {
    "quick": Settings(dims=(2, 10), steps=20, updates=(10,), seeds=2),
    "default": Settings(),
    "full": Settings(ess=(0.05, 0.003), updates=(10, 20, 40, 80, 160), samples=2000, seeds=10),
}
KEYS = ("ess", "dim", "budget", "method")
METRICS = {
    "component_tv": "component TV",
    "gap": "gap (nats)",
    "log_z_error": "abs. log Z error (nats)",
    "ess_share": "ESS over the exact denoiser's",
    "gap_left": "gap over the prior's",
    "calls": "energy calls",
    "network_evaluations": "network evaluations",
}


@dataclass(frozen=True)
class Run:
    """One method on one problem, at all budgets; the prior itself, at none."""

    method: str
    dim: int
    ess: float
    seed: int
    steps: int
    batch_size: int
    updates: tuple[int, ...]
    samples: int


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    shared = settings.steps, settings.batch_size, settings.updates, settings.samples
    runs = {
        f"ess{ess:g}-D{dim:03d}-seed{seed:02d}-{method}": Run(method, dim, ess, seed, *shared)
        for seed in range(settings.seeds)
        for ess in settings.ess
        for dim in settings.dims
        for method in (PRIOR, *METHODS, *WEIGHTED)
    }
    said = partial(answer, steps=settings.steps)
    return Study("dimension", plain(settings), runs, perform, KEYS, METRICS, said, figure)


def perform(run: Run) -> list[Row]:
    """A row for each budget."""
    problem = problem_of(run.dim, run.ess, run.seed, run.steps, run.samples)

    def row(budget: int, measured: Row) -> Row:
        own = {"ess": run.ess, "dim": run.dim, "budget": budget, "method": run.method, "seed": run.seed}
        known = {name: getattr(problem, name) for name in ("gap_prior", "gap_exact", "ess_exact", "log_z")}
        gap = measured["gap"]
        return {**own, **measured, "gap_left": None if gap is None else gap / problem.gap_prior, **known}

    if run.method == PRIOR:
        return [row(0, {"calls": 0, "network_evaluations": 0, "diverged": 0, **measure(problem, problem.prior.denoiser)})]
    method = WEIGHTED[run.method][1] if run.method in WEIGHTED else METHODS[run.method]
    rows: list[Row] = []
    for updates in run.updates:
        config = train_config(method, problem, updates, run.batch_size)
        if run.method in WEIGHTED:
            rows.append(row(PROBE + updates * run.batch_size, _by_weight(problem, config)))
            continue
        # On-policy trainings have no held-out paths to see by whether the prior was closer. The recipe ends at what came closest.
        [measured], _ = trained(problem, config, () if config.warm_start != "none" else (config.updates,))
        rows.append(row(PROBE + updates * run.batch_size, measured))
    return rows


def _by_weight(problem: Problem, config: TrainConfig) -> Row:
    """What a training's population says before the training; its held-out paths are left out, as they are there."""
    assert isinstance(problem.prior.denoiser, nn.Module)
    with Evaluations(problem.prior.denoiser) as meter:
        state = prepared(problem, config)
    population = state.preparation.population
    assert population is not None
    spent = {"calls": state.energies.meter.calls, "network_evaluations": meter.count, "diverged": 0}
    return {**spent, **measure_weighted(problem, population)}
