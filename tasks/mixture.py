"""The mixture task: 25 equal modes in the plane, fine-tuned onto nine unequal ones of them. The truth is known in closed form.

With a dimension it is another problem, a random mixture of that dimension (`tilted_mixture`). Of the plane:
`mixture_target` holds prior, target and energy, `mixture_chains` the samplers. `data/make_prior` pretrained the shipped priors,
`data/make_reference` measured the exact posterior denoiser on each chain.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..finetune.certificate.criteria import judge_known
from ..finetune.config.certificate import CertificateConfig
from ..finetune.config.energy import EnergyConfig
from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig
from ..finetune.config.train import ObjectiveName, TrainConfig
from . import tilted_mixture
from .mixture_chains import CHAINS, DEFAULT_STEPS, build_chain, shipped_prior, shipped_reference
from .task import Task

if TYPE_CHECKING:
    from typing import Literal

    import torch
    from matplotlib.figure import Figure

    from ..finetune.certificate.criteria import Verdict
    from ..finetune.certificate.evidence import Evidence
    from ..finetune.energies.energy import Energy
    from ..samplers.prior import Prior

# Prior paths where the default are too few: on the flow, whose states take no fresh noise (`ForwardKL.rows`), and on twice
# the steps.
POPULATION = {"flow": 80_000, "brownian": 18_000}
# Rollouts a side: the spread of the lightest mode, a fifteenth of them, is then known to 1%.
CERTIFICATE_SIZE = 40_000


def recipe(
    chain: str = CHAINS[0],
    steps: int | None = None,
    *,
    objective: ObjectiveName = "log_variance",
    alpha: float = 1.0,
    warm_start: Literal["tlm", "none"] = "tlm",
    seed: int = 0,
) -> RunConfig:
    """A training of half a minute on one core. steps: the chain's own default where None."""
    # A checkpoint holds the population, and takes as long as fifty steps.
    train = TrainConfig(objective=objective, alpha=alpha, warm_start=warm_start, seed=seed, checkpoint_every=500)
    if objective == "reinforce_kl":
        # Its updates take twice the calls of the others.
        train = replace(train, population_size=8_000)
    if chain in POPULATION:
        train = replace(train, population_size=POPULATION[chain])
    if chain == "brownian":
        # Twice the steps, and a gap of .11 to fit instead of .3.
        train = replace(train, batch_size=256)
    if warm_start == "none" and objective == "reinforce_kl":
        # On-policy samples only, so coverage hangs on how slowly the temperature falls.
        train = replace(train, updates=800, batch_size=512, learning_rate=5e-3, tempering_ess=0.6)
    elif warm_start == "none":
        # Half of each batch are the population's own paths, again and again.
        train = replace(train, updates=800, learning_rate=2e-3, population_size=80_000)
    return RunConfig(
        task="mixture",
        prior=PriorConfig(steps=DEFAULT_STEPS[chain] if steps is None else steps, chain=chain),
        energy=EnergyConfig(("energy",)),
        train=train,
        certificate=CertificateConfig(size=CERTIFICATE_SIZE, seed=seed),
    )


def load_prior(config: PriorConfig) -> Prior:
    """The shipped prior of the config's chain; the exact one of a random mixture where the config has a dimension.

    Errors: ValueError for an unknown chain, and for settings that the task's chains fix.
    """
    if config.dim is not None:
        return tilted_mixture.load_prior(config)
    given = asdict(config)
    fixed = [name for name, value in asdict(PriorConfig(steps=config.steps, chain=config.chain)).items() if value != given[name]]
    if fixed:
        raise ValueError(f"the chains of the mixture task fix {', '.join(fixed)}; choose a chain and its steps alone.")
    name = config.chain or CHAINS[0]
    return shipped_prior(name, build_chain(name, config.steps))


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """Distances to exact samples of the target, and log Z and gap against the exact posterior denoiser's on this chain.

    The reference is shipped for the default steps at alpha = 1. Elsewhere it would cost more than the run: log Z is then
    compared with this run's prior side, and the gap is reported, not judged.

    Errors: ValueError for another energy than the task's own, an alpha without closed form, or fewer than 40,000 samples.
    """
    if config.dim is not None:
        return tilted_mixture.metrics(config, evidence, energy, generator)
    from ..finetune.estimators import log_mean_exp
    from .metrics.known_truth import truth_metrics
    from .metrics.samples import generator_on_cpu
    from .mixture_target import certified_target, ideal_log_z

    target = certified_target(evidence.alpha)
    _refuse_other_energy(energy)
    shipped, name, steps = shipped_reference(), config.chain or CHAINS[0], config.steps
    exact_w2 = (shipped["w2_exact"]["mean"], shipped["w2_exact"]["se"]) if evidence.alpha == 1.0 else None
    found = truth_metrics(evidence.samples, target, energy, generator_on_cpu(generator), exact_w2)
    reference = shipped[name] if evidence.alpha == 1.0 and shipped[name]["steps"] == steps else {}
    log_z, forward = log_mean_exp(evidence.log_weight)[0], log_mean_exp(evidence.target_log_weight)
    # The chain's own log Z: from the reference's 100k rollouts where it has them, else from this run's prior side.
    found["log_z_true"] = reference.get("log_z_forward", forward[0])
    found["log_z_true_se"] = reference.get("log_z_forward_se", forward[1])
    found["log_z_ideal"] = ideal_log_z(evidence.alpha)
    found["log_z_error"] = abs(log_z - found["log_z_true"])
    found["log_z_error_ideal"] = abs(log_z - found["log_z_ideal"])
    return found | {f"{name}_reference": reference.get(name) for name in ("gap", "ess", "elbo", "eubo")}


def _refuse_other_energy(energy: Energy) -> None:
    """Errors: ValueError where ``energy`` differs from the task's own on the modes of the prior."""
    import torch

    from .mixture_target import energy as own
    from .mixture_target import prior_mixture

    modes = prior_mixture().means.float()
    if not torch.allclose(energy(modes).float().cpu(), own(modes), atol=1e-3):
        raise ValueError("the target of the mixture task is known for the task's own energy alone, and this is another one")


def judge(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by exact samples and the exact denoiser."""
    return tilted_mixture.judge(metrics) if "component_tv" in metrics else judge_known(metrics)


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """Prior, policy on the target's contours, and the training curves."""
    if "component_tv" in metrics:
        return tilted_mixture.picture(evidence, energy, history, metrics)
    from .mixture_target import target_mixture
    from .plots.mixture import mixture_figure

    return mixture_figure(evidence.prior_samples, evidence.samples, target_mixture(evidence.alpha), history, metrics)


TASK = Task(
    name="mixture",
    module=f"{__package__}.mixture_target",
    recipe=recipe,
    load_prior=load_prior,
    metrics=metrics,
    judge=judge,
    picture=picture,
    recipe_in=tilted_mixture.recipe,
    refuse=tilted_mixture.refuse,
    reference=tilted_mixture.reference,
)
