"""The funnel task: Neal's funnel in ten dimensions from a fitted Gaussian. The truth is in closed form (`funnel_target`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..finetune.config.certificate import CertificateConfig
from ..finetune.config.energy import EnergyConfig
from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig
from ..finetune.config.train import TrainConfig
from .task import Task, refuse_fixed

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ..finetune.certificate.criteria import Verdict
    from ..finetune.certificate.evidence import Evidence
    from ..finetune.energies.energy import Energy
    from ..samplers.denoiser import Denoiser
    from ..samplers.prior import Prior

STEPS = 100
PARTS = 10


def recipe() -> RunConfig:
    """A training on K = 100: twenty minutes on one thread, nearly all of them updates."""
    return RunConfig(
        task="funnel",
        prior=PriorConfig(steps=STEPS),
        energy=EnergyConfig(("energy",)),
        train=TrainConfig(population_size=8000, updates=3000, batch_size=256, learning_rate=1e-3, checkpoint_every=500),
        certificate=CertificateConfig(size=10_000),
    )


def load_prior(config: PriorConfig) -> Prior:
    """The fitted Gaussian in ten dimensions.

    Errors: ValueError for settings that are fixed.
    """
    from .fitted_prior import gaussian_prior
    from .funnel_target import SCALE

    refuse_fixed(config, "steps")
    return gaussian_prior(SCALE, config.steps)


def _refuse_unknown(config: PriorConfig, energy: Energy, alpha: float) -> None:
    """Errors: ValueError where the tilted law is not the funnel."""
    from .funnel_target import energy as own
    from .metrics.exact_target import refuse_other_energy

    refuse_other_energy(energy, own, load_prior(config))
    if alpha != 1:
        raise ValueError(f"alpha is {alpha:g}: the tilted law is the funnel at alpha = 1 alone")


def reference(config: PriorConfig, energy: Energy, alpha: float) -> Denoiser:
    """The funnel's exact denoiser on the prior's chain.

    Errors: ValueError for another energy than the task's own, and another alpha than 1.
    """
    from .cosine_chain import cosine_chain
    from .exact_denoiser import ExactDenoiser
    from .funnel_target import Funnel

    _refuse_unknown(config, energy, alpha)
    return ExactDenoiser(Funnel(), cosine_chain(config.steps))


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """Ten equal parts of the funnel by depth, x0, and ten by radius at that depth; energies, and log Z.

    Errors: ValueError where the tilted law is not the funnel.
    """
    import torch

    from .funnel_target import depth, radius, sample
    from .metrics.exact_target import energy_metrics, log_z_metrics, part_metrics
    from .metrics.samples import generator_on_cpu

    _refuse_unknown(config, energy, evidence.alpha)
    generator = generator_on_cpu(generator)
    exact = sample(2 * len(evidence.samples), generator)
    even = torch.full((PARTS,), 1 / PARTS, dtype=torch.float64)
    found: dict[str, Any] = {}
    for name, share in (("depth", depth), ("radius", radius)):
        own, other = (_parts(share(part)) for part in (evidence.samples, exact[: len(evidence.samples)]))
        found |= part_metrics(name, own, other, even, generator)
    found |= energy_metrics(evidence.energy.cpu(), energy(exact.float()).cpu())
    return found | log_z_metrics(evidence, 0.0)


def _parts(share: torch.Tensor) -> torch.Tensor:
    """Which of ten equal parts shares [N] between 0 and 1 lie in: [N, 10], one of them 1."""
    import torch

    return torch.eye(PARTS, dtype=torch.float64)[(share * PARTS).long().clamp(0, PARTS - 1)]


def judge(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by the funnel's parts and its exact denoiser."""
    from .metrics.exact_target import judge_exact

    return judge_exact(metrics, ("depth", "radius"))


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """x0 and x1 of prior and policy on exact samples, and the training curves."""
    import torch

    from .funnel_target import DIM, sample
    from .plots.projection import projection_figure

    axes = torch.eye(DIM, dtype=torch.float64)[:, :2]
    exact = sample(4000, torch.Generator().manual_seed(0))
    shown = ("depth_tv", "radius_tv", "energy_tv")
    return projection_figure(evidence, axes, exact, None, history, metrics, shown, ("x0", "x1"))


TASK = Task(
    name="funnel",
    module=f"{__package__}.funnel_target",
    recipe=recipe,
    load_prior=load_prior,
    metrics=metrics,
    judge=judge,
    picture=picture,
    reference=reference,
)
