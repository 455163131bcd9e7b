"""What an energy is, the adapters that make one, and the meter that counts and checks every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Energy(Protocol):
    """x [B, ...] decoded samples → E(x) [B], any floating dtype; lower is better, +inf is zero density."""

    def __call__(self, x: Tensor) -> Tensor: ...


def from_reward(reward: Callable[[Tensor], Tensor]) -> Energy:
    """E = -R, for a reward that is to be maximized. Not for densities: exp(-E) is taken later, once."""

    def energy(x: Tensor) -> Tensor:
        return -reward(x)

    return energy


def from_density(density: Callable[[Tensor], Tensor]) -> Energy:
    """E = -log R, for a non-negative density R, so that exp(-E) = R. R = 0 becomes +inf, a negative R becomes NaN.

    Passing R itself as a reward would target p_prior · exp(R): the double exponentiation of arXiv 2509.01632.
    """

    def energy(x: Tensor) -> Tensor:
        return -torch.log(density(x))

    return energy


class EnergyError(ValueError):
    """An energy that returned something other than B finite-or-+inf floats, or raised."""


@dataclass(eq=False)
class EnergyMeter:
    """Calls an energy, counts, and checks what comes back.

    NaN and -inf have no meaning as a density: they are returned as NaN for the caller to mask, counted in ``invalid``,
    and above ``max_invalid`` of all calls so far they stop the run. +inf is zero density: kept, counted in ``forbidden``.
    """

    energy: Energy
    max_invalid: float = 0.05
    calls: int = 0
    invalid: int = 0
    forbidden: int = 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """x [B, ...] → energies [B] float32 on the device of ``x``; NaN marks an invalid one.

        Errors: EnergyError for a raise, a wrong type, shape or dtype, a graph, or too many invalid values.
        """
        name = getattr(self.energy, "__name__", type(self.energy).__name__)
        try:
            with torch.enable_grad():  # as the user calls it: a forgotten no_grad must show
                value = self.energy(x.clone())  # an energy that works in place must not move the trajectory
        except Exception as error:
            raise EnergyError(
                f"energy {name} raised {type(error).__name__}: {error} (input: {tuple(x.shape)} {x.dtype} on {x.device})."
            ) from error
        if not isinstance(value, Tensor):
            raise EnergyError(f"energy {name} returned {type(value).__name__}, not a tensor of shape [{len(x)}].")
        if value.shape != (len(x),):
            raise EnergyError(
                f"energy {name} returned shape {tuple(value.shape)} for {len(x)} samples; one number a sample is needed,"
                f" shape ({len(x)},). Sum over dimensions, do not average, and drop trailing axes of size 1."
            )
        if not value.is_floating_point():
            raise EnergyError(f"energy {name} returned {value.dtype}; return floating-point energies (value.float()).")
        if value.requires_grad:
            raise EnergyError(
                f"energy {name} returned a tensor that requires grad, which would keep its graph alive for the whole run;"
                " decorate it with @torch.no_grad() or return value.detach()."
            )
        value = value.to(device=x.device, dtype=torch.float32)
        self.calls += len(x)
        bad = torch.isnan(value) | (value == -torch.inf)
        self.invalid += int(bad.sum())
        self.forbidden += int((value == torch.inf).sum())
        # A share of fewer than 100 samples is an accident: the probe of four must not stop a run over one NaN.
        if self.invalid > self.max_invalid * max(self.calls, 100):
            raise EnergyError(
                f"energy {name} returned NaN or -inf for {self.invalid} of {self.calls} samples, above the {self.max_invalid:.0%}"
                " that are masked; neither is an energy. Return +inf for samples that must not occur."
            )
        return value.masked_fill(bad, torch.nan)
