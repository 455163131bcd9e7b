"""Which estimator of the gradient says most for each network evaluation, and what does it train to?

On policies that on-policy training has reached after some updates, every estimator draws the same number of trajectories again
and again. Its noise is the trace of its covariance. One that costs c evaluations and has the noise v is as good as one of c / 2
and 2 v, since trajectories may be averaged. So its efficiency is v c of the whole path with all steps, over its own v c: 2 means
half of the evaluations for the same noise. And each trains from the prior on, with Adam and as many network evaluations as the
whole path takes for its updates. Adjoint Matching, which has another loss, is in the second comparison alone. What takes
fewer evaluations makes more updates there, and so more energy calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ...samplers.make_policy import make_policy
from ...samplers.policy import Policy
from ...samplers.streams import stream
from .estimators_answer import KEYS, answer, figure
from .gradient_estimators import ESTIMATORS, ROLLOUT, ROW, estimate
from .problem import Problem, measure, problem_of
from .study import Size, Study, plain
from .table import Row
from .training import bounded, from_the_prior, trained


@dataclass(frozen=True)
class Settings:
    """stages: updates after which estimators are compared. estimates: of each, at each stage.
    batch_size: trajectories of an estimate, and of an update. updates: of the whole path, whose evaluations all trainings get."""

    dims: tuple[int, ...] = (2, 10)
    ess: float = 0.05
    steps: int = 50
    stages: tuple[int, ...] = (1, 10, 80)
    estimates: int = 40
    batch_size: int = 40
    updates: int = 40
    learning_rate: float = 3e-3
    samples: int = 500
    seeds: int = 5


SIZES: dict[Size, Settings] = {
    "quick": Settings(dims=(2,), steps=20, stages=(1, 10), estimates=12, batch_size=20, updates=8, seeds=2, samples=200),
    "default": Settings(),
    "full": Settings(dims=(2, 10, 50), stages=(1, 10, 40, 320), estimates=100, updates=160, samples=2000, seeds=10),
}
METRICS = {
    "efficiency": "efficiency for each evaluation",
    "signal": "squared gradient over its noise",
    "evaluations": "network evaluations of an estimate (a backward pass counts two)",
    "gap": "gap at equal evaluations (nats)",
}


@dataclass(frozen=True)
class Run:
    """All estimators on one problem."""

    dim: int
    seed: int
    settings: Settings


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    runs = {f"D{dim:03d}-seed{seed:02d}": Run(dim, seed, settings) for seed in range(settings.seeds) for dim in settings.dims}
    return Study("estimators", plain(settings) | {"estimators": list(ESTIMATORS)}, runs, perform, KEYS, METRICS, answer, figure)


def perform(run: Run) -> list[Row]:
    """A row for each stage and estimator; ``gap`` is of the estimator's own training, and the same at all stages."""
    settings = run.settings
    problem = problem_of(run.dim, settings.ess, run.seed, settings.steps, settings.samples)
    assert problem.alpha == 1.0  # estimators take E for E/alpha
    gaps = {name: _gap_after(problem, name, settings) for name in ESTIMATORS}
    config = from_the_prior(run.seed, settings.stages[-1], 2 * settings.batch_size, settings.learning_rate)
    found, _ = trained(problem, config, settings.stages, partial(_noises, settings=settings))
    rows: list[Row] = []
    for stage, values in zip(settings.stages, found, strict=True):
        for name in ESTIMATORS:
            own = {metric: values[f"{name} {metric}"] for metric in ("efficiency", "signal", "evaluations")}
            own |= {"gap": gaps[name], "gap_prior": problem.gap_prior, "gap_there": values["gap"]}
            rows.append({"dim": run.dim, "stage": stage, "estimator": name, "seed": run.seed, **own})
    return rows


def _noises(problem: Problem, policy: Policy, *, settings: Settings) -> Row:
    """Of every estimator at this policy: {"NAME efficiency", "NAME signal", "NAME evaluations"}; and the policy's gap."""
    found: Row = {"gap": measure(problem, policy)["gap"]}
    product: dict[str, float] = {}
    for name in ESTIMATORS:
        generator = stream("certificate", problem.seed)
        drawn: list[torch.Tensor] = []
        spent = 0
        for _ in range(settings.estimates):
            policy.zero_grad()
            spent = estimate(name, problem, policy, settings.batch_size, generator)
            drawn.append(torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None]))
        each = torch.stack(drawn).double()
        noise = each.var(0).sum().item()
        # The squared norm of a mean holds the noise of the mean.
        squared = each.mean(0).square().sum().item() - noise / settings.estimates
        product[name] = noise * spent
        found |= {f"{name} signal": squared / noise, f"{name} evaluations": spent}
    policy.zero_grad()  # the training goes on
    return found | {f"{name} efficiency": product["whole"] / own for name, own in product.items()}


def _gap_after(problem: Problem, name: str, settings: Settings) -> float:
    """Of a training by this estimator, nats."""
    policy, generator = make_policy(problem.prior), stream("training", problem.seed)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, settings.learning_rate)
    chain = problem.prior.chain
    budget = settings.updates * settings.batch_size * (ROLLOUT * chain.num_steps + ROW * chain.num_kernels)
    spent = cost = 0
    while spent + cost <= budget:
        # A linear fall to zero, by what is left of the evaluations.
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - spent / budget)
        optimizer.zero_grad()
        cost = estimate(name, problem, policy, settings.batch_size, generator)
        spent += cost
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
    return bounded("gap", measure(problem, policy)["gap"])
