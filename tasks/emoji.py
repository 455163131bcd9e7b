"""The emoji task: a text-to-image prior of 32 x 32 pictures that two cores can run, a `StableDiffusionPipeline` like any other.

Truth is the prior itself: for each prompt, fresh samples of its chain weighted by exp(-E/alpha). `data/make_emoji` made the
shipped files; the model card in `data/emoji` says how, and how good they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..finetune.certificate.criteria import Criterion, judge_weighted
from ..finetune.config.certificate import CertificateConfig
from ..finetune.config.energy import EnergyConfig
from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig, pretrained_recipe
from ..finetune.energies.pictures import compressibility, incompressibility, redness, symmetry  # named in this task's configs
from .image_recipe import path_criteria, shipped_prior
from .task import Task

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ..finetune.certificate.criteria import Verdict
    from ..finetune.certificate.evidence import Evidence
    from ..finetune.energies.energy import Energy
    from ..samplers.prior import Prior
    from .classifier import ClassEnergy, SmallClassifier

__all__ = ["TASK", "category", "compressibility", "incompressibility", "redness", "symmetry"]
FOLDER = Path(__file__).parent / "data" / "emoji"
CATEGORIES = ("food", "plant", "smiley", "animal")  # in the order of the classifier's classes
PROMPTS = ("a food", "an animal", "a smiley", "a fruit", "a heart", "a flower")


@cache
def classifier() -> SmallClassifier:
    """The classifier of the energy: four categories."""
    from .classifier import SmallClassifier

    return SmallClassifier.load(FOLDER / "classifier")


@cache
def judge() -> SmallClassifier:
    """The classifier that counts what a policy drew: 31 subcategories, trained apart."""
    from .classifier import SmallClassifier

    return SmallClassifier.load(FOLDER / "judge")


def category(*wanted: str) -> ClassEnergy:
    """E(x) = -log p(category in ``wanted`` | x), nats: ``category("food")``, or ``category("food", "plant")``.

    Errors: ValueError for no category, or one that is not of `CATEGORIES`.
    """
    from .classifier import ClassEnergy

    if not wanted or not set(wanted) <= set(CATEGORIES):
        raise ValueError(f"category{wanted} names no set of categories; they are {', '.join(CATEGORIES)}.")
    return ClassEnergy(classifier(), tuple(CATEGORIES.index(name) for name in wanted))


def recipe() -> RunConfig:
    """Redder pictures for six prompts at K = 40: the training of a prior that nothing is known of, with a quarter more paths, for
    longer."""
    train = replace(
        pretrained_recipe().train,
        alpha=0.2,
        population_size=5000,
        soft_value_updates=1500,
        warm_start_updates=800,
    )
    return RunConfig(
        task="emoji",
        prior=PriorConfig(steps=40, prompts=PROMPTS, guidance=1.0),
        energy=EnergyConfig(("redness",)),
        train=train,
        certificate=CertificateConfig(size=1200),
        threads=2,
    )


def load_prior(config: PriorConfig) -> Prior:
    """The shipped pipeline with the config's chain, prompts and guidance."""
    return shipped_prior(FOLDER, config)


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """Of one prompt: subcategories, W2, energies and diversity against the weighted prior samples, each with its error."""
    import torch

    from ..finetune.estimators import mean, weighted_mean
    from .metrics.diversity import diversity_metrics
    from .metrics.images import image_metrics
    from .metrics.samples import on_cpu

    found = image_metrics(evidence, judge(), generator, judge().config["classes"])
    evidence = on_cpu(evidence)
    (own, own_se), (target, target_se) = mean(evidence.energy), weighted_mean(evidence.target_energy, evidence.target_weight)
    one_kind = [torch.zeros(len(side)) for side in (evidence.samples, evidence.target_samples)]
    found |= diversity_metrics(evidence.samples, one_kind[0], evidence.target_samples, one_kind[1], evidence.target_weight, (0,))
    spread = evidence.prior_energy.double().std().item()
    error = math.hypot(own_se, target_se)
    return found | {"energy_reference": target, "energy_off": (own - target) / spread, "energy_off_se": error / spread}


def criteria(metrics: dict[str, Any]) -> list[Criterion]:
    """The bars of a prompt; ``_null`` is what an exact sampler exceeds in three cases of a thousand."""
    return [
        Criterion("mean energy off, in the prior's spreads", abs(metrics["energy_off"]), 0.05 + 3.0 * metrics["energy_off_se"]),
        Criterion("|diversity ratio - 1|", abs(metrics["diversity"] - 1), 0.1),
        Criterion("energy TV", metrics["energy_tv"], 0.03 + metrics["energy_tv_null"]),
        *path_criteria(metrics),
    ]


def judge_run(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by `criteria` and the gap against the prior's."""
    return judge_weighted(criteria(metrics), metrics)


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """Prior, policy and target of one prompt as image grids, with the training curves."""
    from .plots.images import image_figure

    return image_figure(evidence, history, metrics)


TASK = Task(
    name="emoji",
    module=__name__,
    recipe=recipe,
    load_prior=load_prior,
    metrics=metrics,
    judge=judge_run,
    picture=picture,
)
