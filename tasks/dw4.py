"""The DW-4 task: four particles in the plane from a fitted Gaussian. Known of the truth are log Z and the laws of energies and
distances, measured once by importance sampling (`data/make_dw4`); there is no exact denoiser.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..finetune.certificate.criteria import MAX_PARETO_K, Criterion, conclude
from ..finetune.config.certificate import CertificateConfig
from ..finetune.config.energy import EnergyConfig
from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig
from ..finetune.config.train import TrainConfig
from .task import Task, refuse_fixed

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..finetune.certificate.criteria import Verdict
    from ..finetune.certificate.evidence import Evidence
    from ..finetune.energies.energy import Energy
    from ..samplers.prior import Prior

STEPS = 100


def recipe() -> RunConfig:
    """A training on K = 100."""
    return RunConfig(
        task="dw4",
        prior=PriorConfig(steps=STEPS),
        energy=EnergyConfig(("energy",)),
        train=TrainConfig(population_size=8000, batch_size=256, learning_rate=1e-3, checkpoint_every=500),
        certificate=CertificateConfig(size=10_000),
    )


def load_prior(config: PriorConfig) -> Prior:
    """The fitted Gaussian in the six coordinates.

    Errors: ValueError for settings that are fixed.
    """
    from .fitted_prior import gaussian_prior
    from .four_particles import SCALE

    refuse_fixed(config, "steps")
    return gaussian_prior(SCALE, config.steps)


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """Energies and distances against their measured laws on 20 bins of equal shares, and log Z.

    Errors: ValueError for another energy than the task's own, and another alpha than 1.
    """
    from ..finetune.estimators import log_mean_exp
    from .four_particles import distances, measured
    from .four_particles import energy as own
    from .metrics.exact_target import refuse_other_energy

    refuse_other_energy(energy, own, load_prior(config))
    if evidence.alpha != 1:
        raise ValueError(f"alpha is {evidence.alpha:g}: the truth of four particles was measured at alpha = 1 alone")
    truth, estimate = measured(), log_mean_exp(evidence.log_weight)[0]
    return {
        **_histogram("energy", evidence.energy.cpu(), 1, truth),
        **_histogram("distance", distances(evidence.samples.cpu()).flatten(), 6, truth),
        "log_z_true": truth["log_z"],
        "log_z_true_se": truth["log_z_se"],
        "log_z_error": abs(estimate - truth["log_z"]),
    }


def _histogram(name: str, value: Tensor, each: int, truth: dict[str, Any]) -> dict[str, float]:
    """Total variation of values [N · each] from the measured shares, and what as many exact samples would have on average, N of
    which are independent."""
    import torch

    edges, shares = (torch.tensor(truth[f"{name}_{part}"], dtype=torch.float64) for part in ("edges", "shares"))
    found = torch.bincount(torch.bucketize(value.double(), edges), minlength=len(shares)) / len(value)
    error = (shares * (1 - shares) * 2 / (math.pi * len(value) / each)).sqrt()
    return {f"{name}_tv": 0.5 * (found - shares).abs().sum().item(), f"{name}_tv_exact": 0.5 * error.sum().item()}


def judge(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by the measured figures. log Z by the policy's own weights is in doubt where they have a heavy tail."""
    from .metrics.exact_target import part_criteria

    criteria, doubts = part_criteria(metrics, "energy", "distance")
    criteria += [
        Criterion("|log Z error|", metrics["log_z_error"], 0.1),
        Criterion("1 - ESS", 1 - metrics["ess"], 0.8),
    ]
    heavy = metrics["pareto_k"] > MAX_PARETO_K and all(line.met for line in criteria)
    doubts += [f"the Pareto-k of the policy's weights is {metrics['pareto_k']:.2f}, above {MAX_PARETO_K}"] if heavy else []
    return conclude(criteria, doubts)


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """Distances between particles, and energies, of prior and policy on their measured laws; the training curves."""
    from .plots.histograms import histogram_figure

    return histogram_figure(evidence, history, metrics)


TASK = Task(
    name="dw4",
    module=f"{__package__}.four_particles",
    recipe=recipe,
    load_prior=load_prior,
    metrics=metrics,
    judge=judge,
    picture=picture,
)
