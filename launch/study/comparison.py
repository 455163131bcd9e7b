"""A study that compares settings of the training on the same problems: arms, their learning curves, and paired factors.

Every arm trains on every problem and seed from the prior on. It is measured after each of a few numbers of updates, within one
training, so that only the last point has a schedule that is complete. Arms differ in what they name and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...finetune.config.train import TrainConfig
from .comparison_answer import answer, figure
from .methods import LOG_Z_LEARNING_RATE
from .problem import Problem, problem_of, w2_ratio
from .problem import measure as by_truth
from .study import Study, plain
from .table import Row
from .training import from_the_prior, trained


@dataclass(frozen=True)
class Arm:
    """A setting that is compared. label: in tables and figures. changes: fields of `TrainConfig`. against: the arm that it is
    compared with; None for one that others are compared with."""

    label: str
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    against: str | None = None


@dataclass(frozen=True)
class Settings:
    """ess: effective share of the prior. steps: K. updates: after which a training is measured. samples: rollouts that measure
    it."""

    dims: tuple[int, ...] = (2, 10)
    ess: float = 0.05
    steps: int = 50
    updates: tuple[int, ...] = (10, 20, 40)
    batch_size: int = 80
    learning_rate: float = 3e-3
    samples: int = 500
    seeds: int = 5


KEYS = ("dim", "updates", "arm")
METRICS = {
    "gap": "gap (nats)",
    "component_tv": "component TV",
    "w2_ratio": "W2 over that of exact samples",
    "log_z_error": "abs. log Z error (nats)",
    "ess_share": "ESS over the exact denoiser's",
    "calls": "energy calls",
    "network_evaluations": "network evaluations",
    "diverged": "diverged",
}


@dataclass(frozen=True)
class Run:
    """One arm on one problem."""

    name: str
    arm: Arm
    dim: int
    seed: int
    settings: Settings


def comparison(name: str, question: str, arms: dict[str, Arm], settings: Settings) -> Study:
    """The study of these arms. question: with which its answer begins."""
    runs = {
        f"D{dim:03d}-seed{seed:02d}-{arm}": Run(arm, arms[arm], dim, seed, settings)
        for seed in range(settings.seeds)
        for dim in settings.dims
        for arm in arms
    }
    labels = {arm: own.label for arm, own in arms.items()}
    against = {arm: own.against for arm, own in arms.items()}

    def said(rows: list[Row]) -> str:
        return answer(rows, question, labels, against)

    def shown(rows: list[Row]) -> Any:
        return figure(rows, labels)

    own = {arm: own.changes for arm, own in arms.items()}
    return Study(name, plain(settings) | {"arms": own}, runs, perform, KEYS, METRICS, said, shown)


def perform(run: Run) -> list[Row]:
    """A row for each number of updates."""
    settings = run.settings
    problem = problem_of(run.dim, settings.ess, run.seed, settings.steps, settings.samples)
    rows, _ = trained(problem, config_of(run.arm, settings, run.seed), settings.updates, look)
    own = {"dim": run.dim, "arm": run.name, "seed": run.seed, "gap_prior": problem.gap_prior, "gap_exact": problem.gap_exact}
    return [{**own, "updates": updates, **row} for updates, row in zip(settings.updates, rows, strict=True)]


def look(problem: Problem, policy: Callable[..., Any]) -> Row:
    """`measure`, and W2."""
    return {**by_truth(problem, policy), "w2_ratio": w2_ratio(problem, policy)}


def config_of(arm: Arm, settings: Settings, seed: int) -> TrainConfig:
    """On-policy from the prior on, at the target's temperature, but for what the arm changes."""
    own: dict[str, Any] = {"batch_size": settings.batch_size, "learning_rate": settings.learning_rate}
    own |= {"log_z_learning_rate": LOG_Z_LEARNING_RATE, **arm.changes}
    return from_the_prior(seed, settings.updates[-1], **own)
