"""The temperature whose tilt a policy is closest to, of a policy that was trained without one.

KL(policy || p*_alpha) = KL(policy || prior) + E_policy[E]/alpha + log Z(alpha) is convex in 1/alpha, with the slope
E_policy[E] - E_alpha[E]. So it is least where the tilt has the policy's own mean energy, and there

    KL(policy || prior) = KL(policy || p*_alpha) + KL(p*_alpha || prior):

the second is the least that any policy of this mean energy moves (Csiszár 1975), the first is what this one moves besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..estimators import mean
from .criteria import STANDARD_ERRORS

FEWEST = 30.0  # effective prior samples below which a tilt is no longer known
STEPS = 60  # of the bisection


@dataclass(frozen=True)
class ClosestAlpha:
    """alpha: infinite where the policy's energies are not lower than the prior's. effective: prior samples at that alpha, over
    the conditions. beyond: the policy's energies are lower than any tilt reaches that the prior's samples know; alpha is then the
    lowest that they know."""

    alpha: float
    effective: float
    beyond: bool


def closest_alpha(policy: list[Float[Tensor, " n"]], prior: list[Float[Tensor, " m"]]) -> ClosestAlpha:
    """One alpha for several laws, the energies of each in an entry; energies that are no finite numbers do not count.

    Errors: ValueError where fewer than `FEWEST` energies of a law are finite, on either side.
    """
    own = [energy[energy.isfinite()].double() for energy in policy]
    base = [energy[energy.isfinite()].double() for energy in prior]
    for name, energies in (("policy", own), ("base", base)):
        fewest = min(len(energy) for energy in energies)
        if fewest < FEWEST:
            raise ValueError(
                f"only {fewest} energies of the {name}'s rollouts are finite, which says nothing; draw more rollouts, or look at"
                " the energy."
            )
    everything = float(sum(len(energy) for energy in base))
    wanted = sum(energy.mean().item() for energy in own) / len(own)
    now = sum(energy.mean().item() for energy in base) / len(base)
    error = math.hypot(*(mean(energy)[1] for energy in (*own, *base))) / len(own)
    if wanted > now - STANDARD_ERRORS * error:
        return ClosestAlpha(math.inf, everything, beyond=False)

    def may_be_steeper(inverse: float) -> bool:
        energy, effective = _tilted(base, inverse)
        return energy > wanted and min(effective) >= FEWEST

    low, high = 0.0, 1.0 / max(1e-12, max(energy.std().item() for energy in base))
    while may_be_steeper(high):
        low, high = high, 2 * high
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if may_be_steeper(middle) else (low, middle)
    effective = min(_tilted(base, low)[1])
    return ClosestAlpha(1 / low if low else math.inf, effective, beyond=_tilted(base, high)[0] > wanted)


def _tilted(base: list[Float[Tensor, " m"]], inverse: float) -> tuple[float, list[float]]:
    """(mean energy of the tilts over the laws, effective number of samples of each) at 1/alpha."""
    weights = [torch.softmax(-inverse * energy, 0) for energy in base]
    means = [(weight @ energy).item() for weight, energy in zip(weights, base, strict=True)]
    return sum(means) / len(means), [1 / weight.square().sum().item() for weight in weights]


def least_kl(prior: Float[Tensor, " m"], alpha: float) -> float:
    """KL(p*_alpha || prior), nats, by weighted prior samples: the least that a policy of the same mean energy moves. 0 at an
    infinite alpha."""
    if alpha == math.inf:
        return 0.0
    energy = prior[prior.isfinite()].double()
    assert len(energy)
    log_z = torch.logsumexp(-energy / alpha, 0) - math.log(len(energy))
    return (-(torch.softmax(-energy / alpha, 0) @ energy) / alpha - log_z).item()
