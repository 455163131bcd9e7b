"""Before any training: whether an energy answers alike for the same samples, whatever else is in their batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cache import CachedEnergy
from .energy import Energy, EnergyMeter
from .error import EnergyError, energy_name
from .weighted_sum import WeightedSum

ROUNDING = 1e-5  # of the largest energy; and
NOTHING = 1e-3  # of alpha, in nats: a difference within either is not told
HARMLESS = 1e-2  # of alpha; and
FAINT = 0.1  # of the range of the energies: within either it is a warning, not an error
QUESTIONS = {  # the rows of each batch that is asked for, the words for it, and what to write
    "for the same samples a second time": (
        [[0, 1, 2, 3]],
        "draw no random numbers in it, put networks into evaluation mode with .eval(), or seed a generator anew for each sample",
    ),
    "for the same samples in other batches": (
        [[3, 0, 1], [2]],
        "compute each sample's energy from that sample alone: no mean, rank or noise of the batch, networks in .eval() mode",
    ),
}


def probe_energy(meter: EnergyMeter, x: Tensor, first: Tensor, context: Mapping[str, Any], alpha: float) -> None:
    """Ask again for the samples ``x`` [4, ...], whose energies were ``first`` [4]: in the same batch, and in two others. These
    eight samples are counted by the meter. A memory in front of the energy is passed by.

    A residual can be zero everywhere, and a certificate can mean something, for one E(x) only; and which samples share a batch
    depends on settings that must not matter. What may be rounding, in half precision or of a scorer with batches of its own, is
    warned of.

    Errors: EnergyError, which names the energy, or the terms of a sum, that answered otherwise.
    """
    terms: dict[str, Tensor] = getattr(meter.energy, "term_values", {})
    again = replace(meter, energy=_without_memory(meter.energy))
    finite = first[first.isfinite()].double()
    largest = finite.abs().max().item() if len(finite) else 0.0
    spread = (finite.max() - finite.min()).item() if len(finite) else 0.0
    try:
        for how, (batches, remedy) in QUESTIONS.items():
            answer, answered_terms = _ask(again, x, context, batches)
            apart = _apart(first, answer)
            difference, worst = apart.max().item(), int(apart.argmax())
            if difference <= max(ROUNDING * largest, NOTHING * alpha):
                continue
            name = _changed(terms, answered_terms, getattr(again.energy, "titles", {})) or energy_name(again.energy)
            found = (
                f"energy {name} answered differently {how}: {first[worst].item():.6g}, then {answer[worst].item():.6g}, where"
                f" alpha is {alpha:g}."
            )
            if difference > max(HARMLESS * alpha, FAINT * spread):
                raise EnergyError(f"{found} No policy can fit two energies of one sample; {remedy}.")
            warnings.warn(
                f"{found} If this is rounding, in half precision or by a scorer that makes batches of its own, training goes on"
                f" with that much noise; otherwise {remedy}.",
                stacklevel=2,
            )
            return
    finally:
        meter.calls, meter.invalid, meter.forbidden = again.calls, again.invalid, again.forbidden


def _ask(meter: EnergyMeter, x: Tensor, context: Mapping[str, Any], batches: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Energies [4] in the order of ``x``, and those of the terms of a sum, asked for in these batches of rows."""
    order = torch.tensor([row for rows in batches for row in rows]).argsort()
    values, terms = [], []
    for rows in batches:
        part = {key: _rows(value, rows) for key, value in context.items()}
        values.append(meter(_rows(x, rows), **part).cpu())
        terms.append({name: value.cpu() for name, value in getattr(meter.energy, "term_values", {}).items()})
    return torch.cat(values)[order], {name: torch.cat([one[name] for one in terms])[order] for name in terms[0]}


def _rows(value: Any, rows: list[int]) -> Any:
    return value[torch.tensor(rows, device=value.device)] if isinstance(value, Tensor) else [value[row] for row in rows]


def _without_memory(energy: Energy) -> Energy:
    """The same energy, asked each time."""
    if isinstance(energy, CachedEnergy):
        return _without_memory(energy.energy)
    if isinstance(energy, WeightedSum) and any(isinstance(term, CachedEnergy) for _, term in energy.terms.values()):
        bare = WeightedSum({name: (scale, _without_memory(term)) for name, (scale, term) in energy.terms.items()})
        bare.titles = energy.titles
        return bare
    return energy


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """|one - other|: 0 where both are the same infinity or both invalid, +inf where only one of them is."""
    one, other = one.cpu().double(), other.cpu().double()
    same = (one == other) | (one.isnan() & other.isnan())
    return (one - other).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor], titles: Mapping[str, str]) -> str:
    """The terms of a sum that are apart by more than rounding; "" for an energy that is none."""
    moved = [name for name, values in before.items() if bool((_apart(values, after[name]) > ROUNDING * values.abs().cpu()).any())]
    return " and ".join(titles.get(name, name) for name in moved)
