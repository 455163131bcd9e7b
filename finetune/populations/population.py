"""A population: whole paths with weights, that stand for the tilted path law."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...samplers.resampling import systematic
from ...samplers.trajectory import Trajectories
from ..estimators import adequate_alpha, ess

ENOUGH, FEWEST = 0.025, 25  # effective prior paths that can stand for a tilted law: their share, 100 of 4000; their number
FURTHEST = 4.0  # times alpha up to which what is learned at a milder temperature may be continued from it


@dataclass(frozen=True, eq=False)
class Population:
    """N prior trajectories with their energies: reweighted by exp(-E/alpha) they are the tilted path law.

    trajectories: states [K + 1, N, ...] and energy [N], NaN where invalid, +inf where the density is zero.
    """

    trajectories: Trajectories

    @property
    def energy(self) -> Tensor:
        """[N]."""
        energy = self.trajectories.energy
        assert energy is not None
        return energy

    def __len__(self) -> int:
        return len(self.trajectories)

    def log_weight(self, alpha: float) -> Tensor:
        """-E/alpha [N], -inf for invalid energies."""
        return torch.nan_to_num(-self.energy / alpha, nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)

    def log_z(self, alpha: float) -> float:
        """log mean exp(-E/alpha) over the valid prior samples: the forward estimate of log Z."""
        valid = ~self.energy.isnan()
        return (self.log_weight(alpha)[valid].logsumexp(0) - math.log(int(valid.sum()))).item()

    def ess(self, alpha: float) -> float:
        """Effective number of samples of the tilted law."""
        return ess(self.log_weight(alpha)) * len(self)

    def draw(self, count: int, alpha: float, generator: torch.Generator) -> Tensor:
        """Indices [count] drawn with probability ∝ exp(-E/alpha), systematically: least variance for given weights."""
        return systematic(self.log_weight(alpha).double().softmax(0), count, generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {"states": self.trajectories.states, "energy": self.energy}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device) -> Population:
        return cls(Trajectories(state["states"].to(device), energy=state["energy"].to(device)))


def temperature_within_reach(energy: Tensor, alpha: float) -> float:
    """The temperature, from ``alpha`` up, at which enough prior samples (`ENOUGH`, `FEWEST`) are effective to stand for the
    tilted law.

    ``alpha`` itself where that is beyond `FURTHEST` times it: few meet a strict constraint, at any temperature. energy [N] of
    prior samples, NaN where invalid.
    """
    valid = energy[~energy.isnan()]
    share = max(ENOUGH, FEWEST / len(valid)) if len(valid) > FEWEST else 1.0
    found = adequate_alpha(valid, alpha, share)
    return found if found <= FURTHEST * alpha else alpha
