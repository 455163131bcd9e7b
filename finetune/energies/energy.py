"""What an energy is, the adapters that make one of a reward or a density, and the meter that counts and checks every call."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .answer import checked, refuse_graph
from .error import EnergyError, energy_name, user_line, user_trace
from .images import IMAGE_FORMS, ImageForm, image_reward


class Energy(Protocol):
    """x [B, ...] decoded samples → E(x) [B], any floating dtype; lower is better, +inf is zero density.

    context: what else is known of the samples, one value a sample: ``class_labels`` [B] of a class-conditional prior, or
    ``prompts`` and ``metadata``. An energy receives those that its signature names (all, if it takes ``**context``).
    """

    # *args and **context of type Any are the typing system's "and anything else": def energy(x) is an Energy too.
    def __call__(self, x: Tensor, /, *args: Any, **context: Any) -> Tensor: ...


def from_reward(
    reward: Callable[..., Any],
    *,
    images: ImageForm | None = None,
    prompts: str | None = None,
    metadata: Any = None,
    score: str | None = None,
) -> Energy:
    """E = -R, for a reward that is to be maximized. Not for densities: exp(-E) is taken later, once.

    Without ``images``, ``reward(x) -> [B]``. With it, ``reward(images, prompts, metadata) -> (scores, info)``, the form of
    DDPO (arXiv 2305.13301) and Flow-GRPO (arXiv 2505.05470); B scores as a tensor, an array or a list. Their own rewards
    take "unit" or "uint8" images.

    images: what the reward takes for images. "raw": the samples as they are; for samples in [-1, 1], "unit": float
        [B, C, H, W] in [0, 1], "uint8": numpy [B, H, W, C], "pil": a list of PIL images.
    prompts, metadata: one value for every sample. Where None, those of the context are used, else "" and {}.
    score: which scores to take where they come as a dict, as those of Flow-GRPO's ``multi_score`` do ("avg").

    Errors: ValueError for an unknown ``images`` or for options of the second form without it.
    """
    if images is None:
        if prompts is not None or metadata is not None or score is not None:
            raise ValueError(
                "prompts, metadata and score belong to rewards of the form (images, prompts, metadata) -> (scores, info);"
                f" say what such a reward takes for images: images= one of {', '.join(IMAGE_FORMS)}."
            )

        def energy(x: Tensor, **context: Any) -> Tensor:
            return -reward(x, **context_for(reward, context, len(x)))

    else:
        scores = image_reward(reward, images, prompts, metadata, score)

        def energy(x: Tensor, **context: Any) -> Tensor:
            return -scores(x, **context_for(scores, context, len(x)))

    energy.__name__ = f"from_reward({energy_name(reward)})"
    return energy


def from_density(density: Callable[..., Tensor]) -> Energy:
    """E = -log R, for a non-negative density R, so that exp(-E) = R. R = 0 becomes +inf, a negative R becomes NaN.

    Passing R itself as a reward would target p_prior · exp(R): the double exponentiation of arXiv 2509.01632.
    """

    def energy(x: Tensor, **context: Any) -> Tensor:
        return -torch.log(density(x, **context_for(density, context, len(x))))

    energy.__name__ = f"from_density({energy_name(density)})"
    return energy


def context_for(energy: Callable[..., Any], context: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The entries of ``context`` that the energy's signature names, or all where it takes ``**context``; tensors as copies.

    Errors: EnergyError for an entry that is not one value a sample, or where a keyword that the energy needs is missing.
    """
    for key, value in context.items():
        if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
            raise EnergyError(f"the context's {key} is not one value for each of {count} samples, as energies expect it.")
    function = energy.forward if isinstance(energy, nn.Module) else energy  # a module's own signature is *args, **kwargs
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have none
        return {}
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if parameters and parameters[0] in named:
        named = named[1:]  # x
    missing = [one.name for one in named if one.default is one.empty and one.name not in context]
    if missing:
        labels = "samples of a class-conditional prior have class_labels (--labels); else " if missing == ["class_labels"] else ""
        raise EnergyError(
            f"energy {energy_name(energy)} needs {' and '.join(missing)}, which these samples do not come with"
            f" (they have: {', '.join(context) or 'no context'}); {labels}give it a default, fix it with functools.partial, or"
            " use from_reward(..., images=...) for a reward of the form (images, prompts, metadata) -> (scores, info)."
        )
    names = set(context) if any(one.kind is one.VAR_KEYWORD for one in parameters) else {one.name for one in named}
    if isinstance(function, functools.partial):
        names -= set(function.keywords)  # already fixed by the user
    return {key: _own(value) for key, value in context.items() if key in names}


def call_energy(energy: Energy, x: Tensor, context: Mapping[str, Any], name: str) -> Tensor:
    """E(x) [B] on copies of the input, checked: a floating tensor with one number a sample.

    Errors: EnergyError, which names the energy, for a raise or a wrong type, shape or dtype; ``__cause__`` is what was raised.
    """
    taken = context_for(energy, context, len(x))
    try:
        value = energy(x.clone(), **taken)  # an energy that works in place must not move the trajectory
    except EnergyError:
        raise  # of an energy inside this one, which it names
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise EnergyError(
            f"energy {name} raised {type(error).__name__}{user_line(error)}: {said} (input: {tuple(x.shape)} {x.dtype} on"
            f" {x.device}).",
            user_trace(error),
        ) from error
    return checked(value, x, name)


def start_energy(energy: Energy, x: Tensor, context: Mapping[str, Any], name: str) -> Callable[[], Tensor]:
    """`call_energy` in two halves. An energy that ``overlaps`` works between them: its ``start`` returns at once what will
    return E(x). Any other is called in the second half, as it always is.
    """
    if not overlaps(energy):
        return lambda: call_energy(energy, x, context, name)
    taken = context_for(energy, context, len(x))
    return energy.start(x.clone(), **taken)  # pyright: ignore[reportAttributeAccessIssue]


def overlaps(energy: Energy) -> bool:
    """Whether it works elsewhere, so that the next samples can be drawn meanwhile."""
    return getattr(energy, "overlaps", False)


@dataclass(eq=False)
class EnergyMeter:
    """Calls an energy, counts, and checks what comes back.

    ``calls`` counts samples that reached the energy; those that a `CachedEnergy` answered from memory are ``cache_hits``.
    A `WeightedSum` counts once a sample, whatever its number of terms.

    NaN and -inf have no meaning as a density: they are returned as NaN for the caller to mask, counted in ``invalid``,
    and above ``max_invalid`` of all samples so far they stop the run. +inf is zero density: kept, counted in ``forbidden``.
    """

    energy: Energy
    max_invalid: float = 0.05
    calls: int = 0
    invalid: int = 0
    forbidden: int = 0
    cache_hits: int = field(default=0, init=False)

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        """x [B, ...] and one value of context a sample → energies [B] float32 on the device of ``x``; NaN marks an invalid one.

        Errors: EnergyError for a raise, a wrong type, shape or dtype, a graph, or too many invalid values.
        """
        return self.start(x, **context)()

    def start(self, x: Tensor, **context: Any) -> Callable[[], Tensor]:
        """The same in two halves, one batch at a time: an energy that `overlaps` works between them."""
        finish = start_energy(self.energy, x, context, energy_name(self.energy))
        return lambda: self._counted(x, finish)

    @torch.no_grad()
    def _counted(self, x: Tensor, finish: Callable[[], Tensor]) -> Tensor:
        name = energy_name(self.energy)
        known = getattr(self.energy, "cache_hits", 0)
        with torch.enable_grad():  # as the user calls it: a forgotten no_grad must show
            value = finish()
        refuse_graph(value, name)
        value = value.to(device=x.device, dtype=torch.float32)
        hits = getattr(self.energy, "cache_hits", 0) - known
        self.cache_hits += hits
        self.calls += len(x) - hits
        bad = torch.isnan(value) | (value == -torch.inf)
        self.invalid += int(bad.sum())
        self.forbidden += int((value == torch.inf).sum())
        asked = self.calls + self.cache_hits
        # A share of fewer than 100 samples is an accident: the probe of four must not stop a run over one NaN.
        if self.invalid > self.max_invalid * max(asked, 100):
            raise EnergyError(
                f"energy {name} returned NaN or -inf for {self.invalid} of {asked} samples, above the {self.max_invalid:.0%}"
                " that are masked; neither is an energy. Return +inf for samples that must not occur."
            )
        return value.masked_fill(bad, torch.nan)

    @property
    def term_means(self) -> dict[str, float]:
        """{term: mean of its raw, unscaled energies over the last call, finite ones only}; {} unless it is a `WeightedSum`."""
        values: dict[str, Tensor] = getattr(self.energy, "term_values", {})
        return {name: value[value.isfinite()].float().mean().item() for name, value in values.items()}


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
