"""What a shipped task is: a prior, energies, and what is known of the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ..finetune.certificate.criteria import Verdict
    from ..finetune.certificate.evidence import Evidence
    from ..finetune.energies.energy import Energy
    from ..samplers.denoiser import Denoiser
    from ..samplers.prior import Prior


@dataclass(frozen=True)
class Task:
    """A task by name. Its functions import what they need when they are called, so that naming a task loads no torch.

    module: where its energies are. recipe: the default config. load_prior: the shipped prior with the config's chain.
    metrics: (prior config, evidence, energy, generator) → what the truth adds to a certificate; ValueError where it adds nothing.
    judge: all metrics, those of the two sides among them → the verdict and its reasons: `judge_known` where the truth is known
    exactly, `judge_weighted` where it is the weighted prior. picture: (evidence, energy, history, metrics) → the run's picture.
    labelled_energy: what stands in place of the recipe's energy where labels are asked for and no energy is.
    recipe_in: (dimension, seed of the prior) → the default config there, for a task that has priors in several dimensions.
    refuse: ValueError for a config of this task that does not fit together, before anything is loaded.
    reference: (prior config, energy, alpha) → the exact denoiser of the tilted prior on its chain, None or a ValueError where it
    is not known.
    """

    name: str
    module: str
    recipe: Callable[[], RunConfig]
    load_prior: Callable[[PriorConfig], Prior]
    metrics: Callable[[PriorConfig, Evidence, Energy, torch.Generator], dict[str, Any]]
    judge: Callable[[dict[str, Any]], tuple[Verdict, list[str]]]
    picture: Callable[[Evidence, Energy, list[dict[str, Any]], dict[str, Any]], Figure]
    labelled_energy: str | None = None
    recipe_in: Callable[[int, int], RunConfig] | None = None
    refuse: Callable[[RunConfig], None] | None = None
    reference: Callable[[PriorConfig, Energy, float], Denoiser | None] | None = None


TASKS = {
    "digits": "8 x 8 handwritten digits, drawn as one class or a set of them",
    "emoji": "32 x 32 pictures from prompts, drawn redder, plainer or more symmetric: a small Stable Diffusion",
    "fashion": "16 x 16 Fashion-MNIST, inpainted from a noisy measurement, or drawn as a class",
    "dw4": "four particles in the plane with double-well distances, from a fitted Gaussian",
    "funnel": "Neal's funnel in ten dimensions, from a fitted Gaussian",
    "manywell": "2^16 wells in 32 dimensions (--dim for others), from a fitted Gaussian",
    "mixture": "25 equal modes in the plane, onto nine unequal ones of them; with --dim a random mixture, tilted",
}


def load_task(name: str) -> Task:
    """The shipped task of this name.

    Errors: ValueError for an unknown one.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}, or name a prior of your own with --prior.")
    return import_module(f".{name}", __package__).TASK


def refuse_fixed(config: PriorConfig, *free: str) -> None:
    """Errors: ValueError where a prior whose settings other than ``free`` are fixed is asked for another one of them."""
    fixed = [item.name for item in fields(config) if item.name not in free and getattr(config, item.name) != item.default]
    if fixed:
        raise ValueError(f"the prior of this task fixes {', '.join(fixed)}; choose {' and '.join(free)} alone.")


def energy_terms(energy: Energy) -> list[Energy]:
    """The energies that a weighted sum adds up, behind a memory or workers or not; a single energy is its own only term.

    Of what worker processes load by name, the terms of the task's own module are loaded here too; the others stay with them.
    """
    from ..finetune.energies.cache import CachedEnergy
    from ..finetune.energies.names import combine, parse_energy
    from ..finetune.energies.weighted_sum import WeightedSum
    from ..finetune.energies.workers.pool import EnergyPool

    if isinstance(energy, CachedEnergy):
        energy = energy.energy
    if isinstance(energy, EnergyPool) and energy.energy is None:
        own = [term for term in energy.terms if parse_energy(term).place in ("", energy.search)]
        return [term for _, term in combine(own, energy.search).terms.values()] if own else []
    if isinstance(energy, EnergyPool) and energy.energy is not None:
        energy = energy.energy
    return [term for _, term in energy.terms.values()] if isinstance(energy, WeightedSum) else [energy]
