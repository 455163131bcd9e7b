"""Weighted sums of energies, which remember each term for the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .energy import Energy, call_energy
from .error import term_title


class WeightedSum:
    """E = Σ_i scale_i E_i: ``WeightedSum({"class": (1.0, wanted), "ink": (0.1, ink)})``.

    term_values: {name: E_i(x) [B]} of the last call, raw, without scale and graph; `EnergyMeter.term_means` reads it.
    titles: {name: what messages call the term}: its name and the user's file.

    Errors: ValueError for no terms, or a scale that is zero, infinite or NaN (0 · inf is no energy).
    """

    def __init__(self, terms: Mapping[str, tuple[float, Energy]]) -> None:
        if not terms:
            raise ValueError("a weighted sum of no energies is no energy; name at least one term.")
        for name, (scale, _) in terms.items():
            if not math.isfinite(scale) or scale == 0:
                raise ValueError(f"the scale of energy {name} is {scale}; it must be finite and not zero (leave the term out).")
        self.terms = dict(terms)
        self.term_values: dict[str, Tensor] = {}
        self.titles = {name: term_title(name, energy) for name, (_, energy) in terms.items()}

    @property
    def __name__(self) -> str:
        return " + ".join(self.titles.values())

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        """x [B, ...] → [B] on the device of ``x``; every term gets its own copy of x and the context that it takes.

        Errors: EnergyError, which names the term, for whatever is wrong with one.
        """
        values = {
            name: call_energy(energy, x, context, self.titles[name]).to(x.device) for name, (_, energy) in self.terms.items()
        }
        self.term_values = {name: value.detach() for name, value in values.items()}
        scaled = [scale * values[name] for name, (scale, _) in self.terms.items()]
        total = scaled[0]
        for one in scaled[1:]:
            total = total + one
        return total
