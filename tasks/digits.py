"""The digits task: a prior on real handwritten digits, 8 x 8 pixels, and the energy of a class or a set of classes; besides, a
prior that is conditioned on the digit.

Truth is the prior itself: fresh samples of its chain weighted by exp(-E/alpha), one in ten of which counts for a single class.
`data/make_digits` made the shipped files; the model card in `data/digits` says how, and how good they are.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..finetune.certificate.criteria import Criterion, judge_weighted
from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig
from .image_recipe import class_criteria, image_recipe, path_criteria, shipped_prior
from .task import Task, energy_terms

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..finetune.certificate.criteria import Verdict
    from ..finetune.certificate.evidence import Evidence
    from ..finetune.energies.energy import Energy
    from ..samplers.prior import Prior
    from .classifier import ClassEnergy, SmallClassifier

FOLDER = Path(__file__).parent / "data" / "digits"
LABELLED = Path(__file__).parent / "data" / "digits_labels"  # the prior that is conditioned on the digit


@cache
def classifier() -> SmallClassifier:
    """The classifier of the energy, trained on one half of the data with smoothed labels."""
    from .classifier import SmallClassifier

    return SmallClassifier.load(FOLDER / "classifier")


@cache
def judge() -> SmallClassifier:
    """The classifier that counts what a policy drew, trained on the other half."""
    from .classifier import SmallClassifier

    return SmallClassifier.load(FOLDER / "judge")


def classes(*wanted: int) -> ClassEnergy:
    """E(x) = -log p(digit in ``wanted`` | x), nats: ``classes(3)``, or ``classes(0, 2, 4, 6, 8)`` for the even ones.

    Errors: ValueError for no digit, or one that is not between 0 and 9.
    """
    from .classifier import ClassEnergy

    if not wanted or not all(isinstance(digit, int) and 0 <= digit <= 9 for digit in wanted):
        raise ValueError(f"classes{wanted} names no set of digits; write classes(3), or classes(0, 2, 4, 6, 8).")
    return ClassEnergy(classifier(), wanted)


def own_class(x: Tensor, class_labels: Tensor) -> Tensor:
    """E(x, c) = -log p(digit c | x), nats: for the prior that is conditioned on digits, each sample's own (``--labels``)."""
    import torch

    log_p = torch.log_softmax(classifier()(x), 1)
    return -log_p[torch.arange(len(x), device=x.device), class_labels]


def recipe() -> RunConfig:
    """One class at alpha = .25 and K = 20, in five minutes on two cores."""
    return image_recipe("digits", "classes(3)", alpha=0.25, updates=80, certificate_size=4500)


def load_prior(config: PriorConfig) -> Prior:
    """The shipped DDPM prior with the config's chain: the one that is conditioned on digits where the config names labels."""
    return shipped_prior(FOLDER if config.labels is None else LABELLED, config)


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """Shares, diversity, W2 and the energy histogram against the weighted prior samples, each with its error."""
    from .classifier import ClassEnergy
    from .metrics.images import image_metrics, wanted_metrics

    found = image_metrics(evidence, judge(), generator)
    # Of several terms of classes none is the wanted one: the histogram over all classes is then what there is to see.
    wanted = [term.wanted for term in energy_terms(energy) if isinstance(term, ClassEnergy)]
    if own_class in energy_terms(energy) and isinstance(config.labels, tuple):
        wanted.append(config.labels)
    return found | (wanted_metrics(evidence, judge(), wanted[0]) if len(wanted) == 1 else {})


def criteria(metrics: dict[str, Any]) -> list[Criterion]:
    """The bars of the task: what a policy that draws the tilted prior, and nothing less, meets."""
    lines = [
        Criterion("energy TV", metrics["energy_tv"], 0.15),
        *path_criteria(metrics),
    ]
    return lines + class_criteria(metrics)


def judge_run(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by `criteria` and the gap against the prior's."""
    return judge_weighted(criteria(metrics), metrics)


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """Prior, policy and target as image grids, with the training curves."""
    from .plots.images import image_figure

    return image_figure(evidence, history, metrics)


TASK = Task(
    name="digits",
    module=__name__,
    recipe=recipe,
    load_prior=load_prior,
    metrics=metrics,
    judge=judge_run,
    picture=picture,
    labelled_energy="own_class",
)
