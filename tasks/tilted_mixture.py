"""The mixture task in any dimension: a random mixture with its exact denoiser, tilted by an energy of a chosen sharpness.

The tilted law is a mixture in closed form, and so are its exact denoiser, its samples and log Z. The policy is the prior's output
plus a residual network, since the prior has nothing to train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..finetune.config.certificate import CertificateConfig
from ..finetune.config.energy import EnergyConfig
from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig
from ..finetune.config.train import TrainConfig
from ..finetune.energies.names import EnergySpec, parse_energy
from .task import energy_terms, refuse_fixed

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ..finetune.certificate.criteria import Verdict
    from ..finetune.certificate.evidence import Evidence
    from ..finetune.energies.energy import Energy
    from ..samplers.denoiser import Denoiser
    from ..samplers.prior import Prior
    from .gaussian_mixture import GaussianMixture
    from .tilts import Tilt

STEPS = 100
CERTIFICATE_SIZE = 10_000
ENERGIES = ("linear", "quadratic", "mixture")  # by name, in `tilts`
NUMBERS = 40_000_000  # that a population holds, 160 MB


def recipe(dim: int, seed: int = 0) -> RunConfig:
    """A training in ``dim`` dimensions, with a linear energy that leaves .003 of the prior effective."""
    train = TrainConfig(population_size=8000, batch_size=256, learning_rate=1e-3, updates=100, checkpoint_every=500)
    return RunConfig(
        task="mixture",
        prior=PriorConfig(steps=STEPS, dim=dim, seed=seed),
        energy=EnergyConfig((f"linear(ess=0.003, seed={seed})" if seed else "linear(ess=0.003)",)),
        train=train,
        certificate=CertificateConfig(size=CERTIFICATE_SIZE),
    )


def refuse(config: RunConfig) -> None:
    """Errors: ValueError where the energies by name and the prior are of different problems."""
    for spec in (parse_energy(term) for term in config.energy.terms):
        if spec.place:
            continue
        if config.prior.dim is None and spec.name in ENERGIES:
            raise ValueError(f"the energy {spec.target} is of the mixture in any dimension; choose one with --dim.")
        if config.prior.dim is not None and spec.name not in ENERGIES:
            raise ValueError(f"the energy {spec.target} is the plane's; with --dim take one of {', '.join(ENERGIES)}.")
        if config.prior.dim is not None and _seed(spec) != config.prior.seed:
            raise ValueError(
                f"the energy {spec.target} is of the mixture with the seed {_seed(spec)}, and the prior's is"
                f" {config.prior.seed}; write {spec.name}(ess=…, seed={config.prior.seed}), or give --prior-seed {_seed(spec)}."
            )


def _seed(spec: EnergySpec) -> Any:
    return spec.keywords.get("seed", spec.arguments[1] if len(spec.arguments) > 1 else 0)


def load_prior(config: PriorConfig) -> Prior:
    """The random mixture of the config's dimension and seed, with its exact denoiser.

    Errors: ValueError for settings that the task's chain fixes.
    """
    from .cosine_chain import cosine_chain
    from .random_mixture import exact_prior

    refuse_fixed(config, "dim", "seed", "steps")
    return exact_prior(_mixture(config), cosine_chain(config.steps))


def _mixture(config: PriorConfig) -> GaussianMixture:
    from .random_mixture import random_mixture

    assert config.dim is not None
    return random_mixture(config.dim, config.seed)


def tilt_of(config: PriorConfig, energy: Energy) -> Tilt:
    """The closed form behind an energy.

    Errors: ValueError for any other energy than one of the task's own, of the prior's seed, without a scale.
    """
    import torch

    from .tilts import TiltEnergy

    assert config.dim is not None
    terms = energy_terms(energy)
    if len(terms) != 1 or not isinstance(terms[0], TiltEnergy) or terms[0].seed != config.seed:
        raise ValueError(
            f"the target is known for one energy of {', '.join(ENERGIES)} with the prior's seed, and this is another"
        )
    own = terms[0].at(config.dim)
    x = _mixture(config).sample(64, torch.Generator().manual_seed(0)).float()
    if not torch.allclose(energy(x).float().cpu(), own.energy(x), rtol=1e-3, atol=1e-3):
        raise ValueError(f"the target is known for {terms[0].__name__} without a scale; choose its ess, or alpha, instead")
    return own


def reference(config: PriorConfig, energy: Energy, alpha: float) -> Denoiser | None:
    """The exact denoiser of the tilted mixture on the prior's chain; None for the plane, whose figures are shipped.

    Errors: ValueError where the tilted law has no closed form.
    """
    if config.dim is None:
        return None
    from .cosine_chain import cosine_chain
    from .gaussian_mixture import MixtureDenoiser

    return MixtureDenoiser(tilt_of(config, energy).target(alpha)[0], cosine_chain(config.steps))


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """Shares of the target's components and energies against exact samples, and log Z against the closed form.

    component_tv: between mean responsibilities of the target's components and their weights, to which they are equal under the
    target, also where components overlap.

    Errors: ValueError where the tilted law has no closed form.
    """
    from .metrics.exact_target import energy_metrics, log_z_metrics, part_metrics
    from .metrics.samples import generator_on_cpu

    generator = generator_on_cpu(generator)
    own = tilt_of(config, energy)
    target, log_z = own.target(evidence.alpha)
    samples = evidence.samples.double().cpu()
    exact = target.sample(2 * len(samples), generator)
    share, exact_share = (target.responsibilities(part) for part in (samples, exact[: len(samples)]))
    return {
        **part_metrics("component", share, exact_share, target.weights, generator),
        **energy_metrics(evidence.energy.cpu(), own.energy(exact.float())),
        **log_z_metrics(evidence, log_z.item()),
    }


def judge(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by exact component weights and the exact denoiser."""
    from .metrics.exact_target import judge_exact

    return judge_exact(metrics, ("component",))


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """Prior and policy in the target's first two principal axes, on its contours, and the training curves."""
    import torch

    from .plots.projection import mixture_projection, projection_figure
    from .tilts import TiltEnergy

    [term] = energy_terms(energy)
    assert isinstance(term, TiltEnergy)
    target = term.at(evidence.samples.shape[1]).target(evidence.alpha)[0]
    axes, contour = mixture_projection(target)
    exact = target.sample(4000, torch.Generator().manual_seed(0))
    return projection_figure(evidence, axes, exact, contour, history, metrics, ("component_tv", "energy_tv"))
