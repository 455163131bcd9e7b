"""RTB and Trust-PCL are one loss up to alpha² (arXiv 2509.01632, Prop. 1). Does that survive training (its question 3)?

The energy is alpha times the problem's, so that the target is the same at each alpha, and so is RTB. Both objectives start from
the same weights and draw with the same noise, in float64. Under SGD with the rate lr / alpha² Trust-PCL must repeat RTB's
weights. Adam divides by the size of the gradient, and its epsilon, a bound of the gradient's norm, and a log Z that is learned as
V = alpha log Z are where they may part. How far they have is the distance of their weights over the distance that RTB went.

On the digits' network, in float32, gradients are compared at a policy that has left its prior, and then a few steps of Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...finetune.learning.batch import Batch
from ...finetune.learning.gradients import backward_trajectories, objective_gradient
from ...finetune.learning.objective_table import OBJECTIVES
from ...samplers.make_policy import make_policy
from ...samplers.policy import Policy
from ...samplers.prior import Prior
from ...samplers.rollout import draw_start, rollout
from ...samplers.streams import stream
from ...tasks import digits
from .equivalence_answer import KEYS, SETTINGS, answer, figure
from .problem import measure, problem_of
from .study import Size, Study, plain
from .table import Row

CHUNK = 2048
RATES = {"sgd": 1e-3, "adam": 3e-3}
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Settings:
    """dims: of the mixtures. digit_updates: steps on the digits; 0 leaves them out."""

    dims: tuple[int, ...] = (2, 10)
    alphas: tuple[float, ...] = (0.01, 0.1, 0.5, 2.0)
    ess: float = 0.05
    steps: int = 20
    updates: int = 20
    batch_size: int = 32
    digit_updates: int = 4
    samples: int = 500
    seeds: int = 5


SIZES: dict[Size, Settings] = {
    "quick": Settings(dims=(2,), alphas=(0.1, 2.0), steps=10, updates=6, digit_updates=0, seeds=2, samples=200),
    "default": Settings(),
    "full": Settings(dims=(2, 10, 50), updates=200, digit_updates=20, samples=2000, seeds=10),
}
METRICS = {
    "loss_error": "|loss ratio - 1| at first",
    "gradient_error": "relative error of the first gradient",
    "parted": "distance of the weights over RTB's way",
}


@dataclass(frozen=True)
class Run:
    """All settings on one problem at one temperature. dim: None for the digits."""

    dim: int | None
    alpha: float
    seed: int
    settings: Settings


def study_of(settings: Settings) -> Study:
    """The study with these settings."""
    problems: list[int | None] = [*settings.dims, *([None] if settings.digit_updates else [])]
    runs = {
        f"{'digits' if dim is None else f'D{dim:03d}'}-seed{seed:02d}-alpha{alpha:g}": Run(dim, alpha, seed, settings)
        for seed in range(settings.seeds)
        for dim in problems
        for alpha in settings.alphas
    }
    return Study("equivalence", plain(settings) | {"rates": RATES}, runs, perform, KEYS, METRICS, answer, figure)


def perform(run: Run) -> list[Row]:
    """A row for each setting."""
    settings, alpha = run.settings, run.alpha
    if run.dim is None:
        return [_digits(run)]
    problem = problem_of(run.dim, settings.ess, run.seed, settings.steps, settings.samples)

    def energy(x: Tensor) -> Tensor:
        return alpha * problem.energy(x).double()

    rows: list[Row] = []
    for setting in SETTINGS:
        both = {name: _trained(problem.prior, energy, name, alpha, setting, run, torch.float64) for name in ("rtb", "trust_pcl")}
        gaps = {f"gap_{short}": measure(problem, both[name].policy.float())["gap"] for name, short in SHORT.items()}
        rows.append(_row(run, f"D = {run.dim}", setting, both["rtb"], both["trust_pcl"]) | gaps)
    return rows


SHORT = {"rtb": "rtb", "trust_pcl": "pcl"}


@dataclass(frozen=True, eq=False)
class Trained:
    """loss, gradient: of the first update. start, weights: before it and after the last, flat."""

    policy: Policy
    loss: float
    gradient: Tensor
    start: Tensor
    weights: Tensor


def _trained(
    prior: Prior, energy: Callable[[Tensor], Tensor], name: str, alpha: float, setting: str, run: Run, dtype: torch.dtype
) -> Trained:
    """``updates`` on-policy steps of one objective; log Z starts at 0."""
    settings, objective = run.settings, OBJECTIVES[name]
    updates = settings.updates if run.dim is not None else settings.digit_updates
    count = settings.batch_size if run.dim is not None else 8
    policy = make_policy(prior).to(dtype)
    if run.dim is None:
        _leave_the_prior(policy, run.seed)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    log_z = torch.zeros(1, dtype=dtype)
    step = _optimizer(weights, log_z, name, alpha, setting)
    generator = stream("training", run.seed)
    start, loss, first = _flat(weights), 0.0, torch.empty(0)
    for update in range(updates):
        drawn = rollout(prior, policy, count, generator, start=draw_start(prior, count, generator, dtype))
        assert drawn.step_log_ratio is not None
        values = energy(prior.to_data(drawn.terminal)).to(dtype)
        batch = Batch(drawn.step_log_ratio, values, ~values.isnan())
        value, gradients = objective_gradient(objective, batch, alpha, log_z)
        backward_trajectories(policy, prior.chain, drawn, gradients["step_log_ratio"], CHUNK)
        if not update:
            loss, first = value.item(), _flat([weight.grad for weight in weights if weight.grad is not None])
        step(gradients["log_z"])
    return Trained(policy, loss, first, start, _flat(weights))


def _optimizer(weights: list[Any], log_z: Tensor, name: str, alpha: float, setting: str) -> Callable[[Tensor], None]:
    """What takes one step, given the gradient of log Z. Trust-PCL's loss is in units of alpha²; SGD's rate makes up for it."""
    sgd = setting == "sgd"
    scale = 1 / alpha**2 if sgd and name == "trust_pcl" else 1.0
    free = log_z.requires_grad_()
    epsilon = 1e-4 if setting == "adam, large epsilon" else 1e-8
    # With V = alpha log Z as the parameter, the same rate moves log Z by 1 / alpha as much.
    rate_z = 0.1 / alpha if setting == "adam, V learned" and name == "trust_pcl" else 0.1
    if sgd:
        optimizer = torch.optim.SGD([{"params": weights, "lr": scale * RATES["sgd"]}, {"params": [free], "lr": scale * 1e-2}])
    else:
        optimizer = torch.optim.Adam([{"params": weights, "lr": RATES["adam"]}, {"params": [free], "lr": rate_z}], eps=epsilon)

    def step(gradient: Tensor) -> None:
        free.grad = gradient
        if setting == "adam, gradient clipped":
            torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _digits(run: Run) -> Row:
    """The shipped digits' network, by float32: eight trajectories a step toward less ink."""
    prior = digits.TASK.load_prior(digits.TASK.recipe().prior)

    def energy(x: Tensor) -> Tensor:
        return run.alpha * x.flatten(1).mean(1)

    both = [_trained(prior, energy, name, run.alpha, "adam", run, torch.float32) for name in SHORT]
    return _row(run, "digits", "adam", *both)


def _leave_the_prior(policy: Policy, seed: int) -> None:
    """Move every weight by 2% of its size, so that log-ratios are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.mul_(1 + 0.02 * torch.randn(weight.shape, generator=generator).to(weight))


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def _row(run: Run, problem: str, setting: str, rtb: Trained, pcl: Trained) -> Row:
    scale = run.alpha**2
    return {
        "problem": problem,
        "alpha": run.alpha,
        "setting": setting,
        "seed": run.seed,
        "loss_error": abs(pcl.loss / (scale * rtb.loss) - 1),
        "gradient_error": ((pcl.gradient - scale * rtb.gradient).norm() / (scale * rtb.gradient).norm()).item(),
        "parted": ((pcl.weights - rtb.weights).norm() / (rtb.weights - rtb.start).norm()).item(),
    }
