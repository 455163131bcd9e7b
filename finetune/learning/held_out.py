"""Held-out prior paths: they tell whether the policy learns the target, or its bank by heart.

Nothing is learned from them but one factor (`ValueDrift.rescale`).

    EUBO(prior) - EUBO(policy) = E_tilted[log-ratio] = KL(tilted || prior) - KL(tilted || policy)

on stored states and stored next states, which is right for any chain and any prior, however far its network is from an exact
denoiser. With fresh rollouts on the other side it is the nats by which the gap EUBO - ELBO has shrunk (`Improvement`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...samplers.denoiser import Denoiser
from ...samplers.log_ratio import outputs, shift_moments
from ...samplers.prior import Prior
from ...samplers.trajectory import Trajectories
from .behaviors import PriorBank

DRAWN = 160  # tilted paths among them that are watched: a systematic draw, so that a heavy path counts more and costs once
ALIKE = 0.05  # nats by which two policies that are judged by the same noise are not told apart
BETTER = 2.0  # standard errors above 0 from which on a policy is said to be closer than its prior


@dataclass(frozen=True)
class Improvement:
    """How much closer to the target than the prior a policy is, in nats of the gap EUBO - ELBO over paths.

    nats, se: prior's gap less the policy's, and its standard error. gap_prior: the prior's own. reached: the phase whose end the
    policy is of; "prior" where nothing that was tried was closer than the prior itself, which the policy then is again. reach:
    the temperature that the held-out paths stand for, over the target's: above 1 where too few prior samples are effective there
    (`temperature_within_reach`). The target's side is then continued from it, as if log h were linear. Energies are those that
    the training sees, cut at ``max_energy``.
    """

    nats: float
    se: float
    gap_prior: float
    reached: str
    reach: float = 1.0

    @property
    def sentence(self) -> str:
        own = f"the prior's own gap to the target is {self.gap_prior:.2f} nats"
        if self.reach > 1:
            own = (
                f"too few prior samples have weight at this alpha, so the target's side was seen at {self.reach:.2g} times alpha"
                f" and continued; so continued, the prior's own gap to the target is {self.gap_prior:.2f} nats"
            )
        if self.reached == "prior" and self.nats == 0:
            return f"NOT BETTER THAN THE PRIOR: nothing that was tried came closer, so the policy is the prior again; {own}."
        if self.reached == "prior":
            return (
                f"NOT BETTER THAN THE PRIOR: the best that was tried has a gap {-self.nats:+.2f} ± {self.se:.2f} nats from the"
                f" prior's, so the policy is the prior again; {own}."
            )
        if self.nats < BETTER * self.se:
            return f"not shown to be better than the prior: {self.nats:+.2f} ± {self.se:.2f} nats; {own}."
        left = self.gap_prior - self.nats
        return f"closer to the target than the prior by {self.nats:.2f} ± {self.se:.2f} nats; {own}, and {left:.2f} are left."

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


class Look(NamedTuple):
    """What the held-out paths say of a policy: its EUBO, at their temperature; the nats of KL(tilted || prior) that it takes
    away at the target's, and their standard error."""

    eubo: float
    gain: float
    error: float


class HeldOut:
    """Tilted paths, with weights that sum to 1, out of prior paths that no phase learns from.

    paths: the trajectories; weight [n]; eubo: the prior's, -E/alpha averaged over them; times: their temperature ``alpha`` over
    the target's; prior_outputs: what the prior says at their states, which every look needs.
    """

    def __init__(
        self,
        prior: Prior,
        paths: Trajectories,
        weight: Tensor,
        alpha: float,
        times: float = 1.0,
        prior_outputs: Tensor | None = None,
    ) -> None:
        assert paths.energy is not None
        self.prior, self.paths, self.weight, self.alpha, self.times = prior, paths, weight, alpha, times
        self.prior_outputs = outputs(prior.chain, prior.denoiser, paths) if prior_outputs is None else prior_outputs
        self.eubo = -(weight * paths.energy.double()).sum().item() / alpha

    @classmethod
    def draw(cls, prior: Prior, bank: PriorBank, alpha: float, times: float, generator: torch.Generator) -> HeldOut:
        """Paths of the bank by their weight at ``times`` the target's temperature ``alpha``."""
        index, count = bank.draw(DRAWN, times * alpha, generator).unique(return_counts=True)
        return cls(prior, bank.trajectories.select(index), count.double() / count.sum(), times * alpha, times)

    def state_dict(self) -> dict[str, Any]:
        paths = self.paths
        tensors = {"states": paths.states, "energy": paths.energy, "weight": self.weight, "outputs": self.prior_outputs}
        return {"alpha": self.alpha, "times": self.times, **tensors}

    @classmethod
    def from_state(cls, prior: Prior, state: dict[str, Any]) -> HeldOut:
        kept = {name: state[name].to(prior.device) for name in ("states", "energy", "weight", "outputs")}
        paths = Trajectories(kept["states"], energy=kept["energy"])
        return cls(prior, paths, kept["weight"], state["alpha"], state["times"], kept["outputs"])

    def moments(self, policy: Denoiser, target: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[2 or 3, n] `shift_moments` of the policy on these paths."""
        return shift_moments(self.prior.chain, policy, self.paths, self.prior_outputs, target)

    def look(self, policy: Denoiser) -> Look:
        """With delta the policy's shift, E<z, delta> - E ½|delta|² is what its EUBO is below the prior's. Where the paths are of
        a milder law than the target, E<z, delta> grows from there by ``times``, if log h is linear."""
        along, size = self.moments(policy)
        eubo = self.eubo - (self.weight * (along - size)).sum().item()
        nats = self.times * along - size
        mean = (self.weight * nats).sum()
        return Look(eubo, mean.item(), math.sqrt((self.weight * (nats - mean)).square().sum().item()))


class Kept:
    """The weights that came closest to the target so far, and by how much they are closer than the prior, nats.

    falls: offers in a row that lay clearly below it.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.nats, self.falls = [weight.clone() for weight in weights], 0.0, 0

    def offer(self, nats: float, weights: list[Tensor], *, slack: float = 0.0, alike: float = 0.0) -> bool:
        """Whether ``weights`` are kept: they are if they are closer, or less close by less than ``alike``, and closer than the
        prior. ``slack``: nats that an offer may lie below without counting as a fall."""
        if nats > max(0.0, self.nats - alike):
            self.nats, self.falls = nats, 0
            for own, weight in zip(self.weights, weights, strict=True):
                own.copy_(weight)
            return True
        self.falls = self.falls + 1 if not nats >= self.nats - slack else 0
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "nats": self.nats, "falls": self.falls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nats, self.falls = state["nats"], state["falls"]
        for own, weight in zip(self.weights, state["weights"], strict=True):
            own.copy_(weight)
