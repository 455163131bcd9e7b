"""The fashion task: a prior on real images, Fashion-MNIST at 16 x 16 pixels, with inpainting and class posteriors.

Truth is the prior itself: fresh samples of its chain weighted by exp(-E/alpha). `data/make_fashion` made the shipped files; the
model card in `data/fashion` says how, and how good they are.
"""

from __future__ import annotations

import math
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
    from .inpainting import Inpainting

FOLDER = Path(__file__).parent / "data" / "fashion"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@cache
def classifier() -> SmallClassifier:
    """The classifier of the energies, trained on one half of the training images."""
    from .classifier import SmallClassifier

    return SmallClassifier.load(FOLDER / "classifier")


@cache
def judge() -> SmallClassifier:
    """The classifier that counts what a policy drew, trained on the other half."""
    from .classifier import SmallClassifier

    return SmallClassifier.load(FOLDER / "judge")


@cache
def heldout() -> Tensor:
    """[10, 1, 16, 16] in [-1, 1]: the first test image of each class, which neither prior nor classifiers have seen."""
    from safetensors.torch import load_file

    return load_file(FOLDER / "heldout.safetensors")["images"].float() / 127.5 - 1


def classes(*wanted: int) -> ClassEnergy:
    """E(x) = -log p(class in ``wanted`` | x), nats: ``classes(9)`` for ankle boots, ``classes(5, 7, 9)`` for all shoes.

    Errors: ValueError for no class, or one that is not between 0 and 9.
    """
    from .classifier import ClassEnergy

    if not wanted or not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in wanted):
        listed = ", ".join(f"{label} {name}" for label, name in enumerate(CLASSES))
        raise ValueError(f"classes{wanted} names no set of classes; they are {listed}.")
    return ClassEnergy(classifier(), wanted)


def inpainting(image: int = 5, region: str = "upper", std: float = 1.6, every: int = 2) -> Inpainting:
    """The energy of held-out image ``image`` (0 to 9, one a class) measured on ``region``, every ``every``-th row and column.

    The default leaves the lower half open, between sandal and sneaker, and 16% of prior samples effective at alpha = 1.

    Errors: ValueError for an image that is not there, or what `measure` refuses.
    """
    from .inpainting import measure

    if not 0 <= image < len(heldout()):
        raise ValueError(f"there is no held-out image {image}; there are {len(heldout())}, one a class, from 0.")
    return measure(heldout()[image], region, std, every=every, seed=0)


def recipe() -> RunConfig:
    """Inpainting at alpha = 1 and K = 20, in some twenty minutes on two cores."""
    return image_recipe("fashion", "inpainting()", alpha=1.0, updates=200, certificate_size=4000)


def load_prior(config: PriorConfig) -> Prior:
    """The shipped DDPM prior with the config's chain."""
    return shipped_prior(FOLDER, config)


def metrics(config: PriorConfig, evidence: Evidence, energy: Energy, generator: torch.Generator) -> dict[str, Any]:
    """Classes, W2 and the energy histogram against the weighted prior samples, and what belongs to each kind of energy."""
    from .classifier import ClassEnergy
    from .inpainting import Inpainting
    from .metrics.images import image_metrics, inpainting_metrics, wanted_metrics

    found = image_metrics(evidence, judge(), generator)
    for term in energy_terms(energy):
        if isinstance(term, ClassEnergy):
            found |= wanted_metrics(evidence, judge(), term.wanted)
        if isinstance(term, Inpainting):
            found |= inpainting_metrics(evidence, term, generator)
    return found


def criteria(metrics: dict[str, Any]) -> list[Criterion]:
    """The bars of the task; ``_null`` is what an exact sampler exceeds in three cases of a thousand."""
    lines = [
        Criterion("energy TV", metrics["energy_tv"], 0.03 + metrics["energy_tv_null"]),
        *path_criteria(metrics),
    ]
    if "share" in metrics or "residual" not in metrics:  # an energy of neither kind leaves these two unmeasured, and says so
        lines += class_criteria(metrics)
    if "residual" in metrics:
        error = math.hypot(metrics["residual_se"], metrics["residual_reference_se"])
        # The noise level is 1; a measurement that the prior itself cannot meet is reproduced as well as the target does.
        lines.append(Criterion("measured residual", metrics["residual"], max(1.0, metrics["residual_reference"] + 3.3 * error)))
        for pixels in ("measured", "unmeasured"):
            for moment in ("mean", "spread"):
                name, null = f"{moment}_error_{pixels}", f"{moment}_error_null_{pixels}"
                lines.append(Criterion(f"{moment} of {pixels} pixels, error", metrics[name], metrics[null]))
    return lines


def judge_run(metrics: dict[str, Any]) -> tuple[Verdict, list[str]]:
    """The verdict by `criteria` and the gap against the prior's."""
    return judge_weighted(criteria(metrics), metrics)


def picture(evidence: Evidence, energy: Energy, history: list[dict[str, Any]], metrics: dict[str, Any]) -> Figure:
    """Prior, policy and target as image grids: beside the measurement for inpainting, else with the training curves."""
    from .inpainting import Inpainting
    from .plots.images import image_figure, inpainting_figure

    for term in energy_terms(energy):
        if isinstance(term, Inpainting):
            return inpainting_figure(evidence, term, metrics)
    return image_figure(evidence, history, metrics)


TASK = Task(
    name="fashion",
    module=__name__,
    recipe=recipe,
    load_prior=load_prior,
    metrics=metrics,
    judge=judge_run,
    picture=picture,
)
