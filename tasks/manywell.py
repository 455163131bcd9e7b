"""The many wells task: 2^(D/2) wells of unequal depth from a fitted Gaussian, of whose samples hardly any count. The truth is a
product of one-dimensional integrals (`double_wells`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..finetune.certificate.criteria import Criterion
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

DIM = 32
STEPS = 100


def recipe(dim: int = DIM, seed: int = 0) -> RunConfig:
    """A training in ``dim`` dimensions. seed: there is one prior, that of 0; another one is refused when it is loaded."""
    return RunConfig(
        task="manywell",
        prior=PriorConfig(steps=STEPS, dim=dim, seed=seed),
        energy=EnergyConfig(("energy",)),
        train=TrainConfig(
            population_size=16_000,
            batch_size=256,
            learning_rate=1e-3,
            warm_start_updates=4000,
            updates=800,
            checkpoint_every=2000,
        ),
        certificate=CertificateConfig(size=10_000),
    )


def load_prior(config: PriorConfig) -> Prior:
    """The fitted Gaussian of the config's dimension, 32 where it names none.

    Errors: ValueError for an odd dimension, and for settings that are fixed.
    """
    from .double_wells import prior_scale
    from .fitted_prior import gaussian_prior

    refuse_fixed(config, "dim", "steps")
    return gaussian_prior(prior_scale(_dim(config)), config.steps)


def _dim(config: PriorConfig) -> int:
    return DIM if config.dim is None else config.dim


def _refuse_other_energy(config: PriorConfig, energy: Energy) -> None:
    """Errors: ValueError where ``energy`` is not the task's own."""
    from .double_wells import energy as own
    from .metrics.exact_target import refuse_other_energy

    refuse_other_energy(energy, own, load_prior(config))


def reference(config: PriorConfig, energy: Energy, alpha: float) -> Denoiser:
    """The exact denoiser of the wells on the prior's chain.

    Errors: ValueError for another energy than the task's own.
    """
    from .cosine_chain import cosine_chain
    from .double_wells import DoubleWells
    from .exact_denoiser import ExactDenoiser

    _refuse_other_energy(config, energy)
    return ExactDenoiser(DoubleWells(_dim(config) // 2, alpha), cosine_chain(config.steps))


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """How many pairs are in their deeper well, the worst pair's share of it, energies, and log Z.

    well_tv: between the law of the number of pairs in the deeper well and the binomial one that it is. well_error: the largest
    difference over the pairs between the share of the deeper well and the exact one.

    Errors: ValueError for another energy than the task's own.
    """
    import torch

    from .double_wells import DoubleWells
    from .metrics.exact_target import energy_metrics, log_z_metrics, part_metrics
    from .metrics.samples import generator_on_cpu

    _refuse_other_energy(config, energy)
    generator = generator_on_cpu(generator)
    truth = DoubleWells(_dim(config) // 2, evidence.alpha)
    exact = truth.sample(2 * len(evidence.samples), generator)
    own, other = ((part[:, ::2] > 0).cpu() for part in (evidence.samples, exact[: len(evidence.samples)]))
    counts = torch.arange(truth.pairs + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(truth.pairs, torch.tensor(truth.right, dtype=torch.float64))
    shares = [torch.eye(truth.pairs + 1, dtype=torch.float64)[side.sum(1)] for side in (own, other)]
    return {
        **part_metrics("well", shares[0], shares[1], binomial.log_prob(counts).exp(), generator),
        "well_error": (own.double().mean(0) - truth.right).abs().max().item(),
        "well_error_exact": (other.double().mean(0) - truth.right).abs().max().item(),
        **energy_metrics(evidence.energy.cpu(), energy(exact.float()).cpu()),
        **log_z_metrics(evidence, truth.log_z),
    }


def judge(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by the exact shares of the wells and the exact denoiser."""
    from .metrics.exact_target import judge_exact

    return judge_exact(metrics, ("well",), Criterion("error of a pair's deeper well", metrics["well_error"], 0.05))


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """The double wells of the first two pairs, and the training curves."""
    import torch

    from .double_wells import DoubleWells
    from .plots.projection import projection_figure

    dim = evidence.samples.shape[1]
    axes = torch.eye(dim, dtype=torch.float64)[:, [0, 2 if dim > 2 else 1]]
    exact = DoubleWells(dim // 2, evidence.alpha).sample(4000, torch.Generator().manual_seed(0))
    names = ("x1 of the first pair", "x1 of the second" if dim > 2 else "x2")
    return projection_figure(evidence, axes, exact, None, history, metrics, ("well_tv", "well_error", "energy_tv"), names)


TASK = Task(
    name="manywell",
    module=f"{__package__}.double_wells",
    recipe=recipe,
    load_prior=load_prior,
    metrics=metrics,
    judge=judge,
    picture=picture,
    recipe_in=recipe,
    reference=reference,
)
