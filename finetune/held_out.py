"""Prior paths that nothing is learned from: they tell whether the policy learns the target, or its bank by heart.

    EUBO(prior) - EUBO(policy) = E_tilted[log-ratio] = KL(tilted || prior) - KL(tilted || policy)

on stored states and stored next states, which is right for any chain and any prior, however far its network is from an exact
denoiser. With fresh rollouts on the other side it is the nats by which the gap EUBO - ELBO has shrunk (`Improvement`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..samplers.log_ratio import outputs, step_log_ratio
from ..samplers.policy import Denoiser, Prior
from ..samplers.trajectory import Trajectories
from .behavior import PriorBank

DRAWN = 160  # tilted paths among them that are watched: a systematic draw, so that a heavy path counts more and costs once
BETTER = 2.0  # standard errors above 0 from which on a policy is said to be closer than its prior


@dataclass(frozen=True)
class Improvement:
    """How much closer to the target than the prior a policy is, in nats of the gap EUBO - ELBO over paths.

    nats, se: prior's gap less the policy's, and its standard error. gap_prior: the prior's own. reached: the phase whose end the
    policy is of; "prior" where nothing that was tried was closer than the prior itself, which the policy then is again. reach:
    the temperature that the held-out paths stand for, over the target's: above 1 where too few of them are effective there
    (`PriorBank.reach`). The policy's EUBO is then compared with the prior's at that temperature, and so is gap_prior.
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
                f"too few prior samples have weight at this alpha, so the target's side was seen at {self.reach:.2g} times alpha,"
                f" where the prior's own gap is {self.gap_prior:.2f} nats"
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
        return f"closer to the target than the prior by {self.nats:.2f} ± {self.se:.2f} nats; {own}."

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


class HeldOut:
    """Tilted paths, with weights that sum to 1, out of prior paths that no phase learns from.

    paths: the trajectories; weight [n]; eubo: the prior's, -E/alpha averaged over them; prior_outputs: what the prior says at
    their states, which every look needs.
    """

    def __init__(
        self, prior: Prior, paths: Trajectories, weight: Tensor, alpha: float, prior_outputs: Tensor | None = None
    ) -> None:
        assert paths.energy is not None
        self.prior, self.paths, self.weight, self.alpha = prior, paths, weight, alpha
        self.prior_outputs = outputs(prior.chain, prior.denoiser, paths) if prior_outputs is None else prior_outputs
        self.eubo = -(weight * paths.energy.double()).sum().item() / alpha

    @classmethod
    def draw(cls, prior: Prior, bank: PriorBank, alpha: float, generator: torch.Generator) -> HeldOut:
        index, times = bank.draw(DRAWN, alpha, generator).unique(return_counts=True)
        return cls(prior, bank.trajectories.select(index), times.double() / times.sum(), alpha)

    def state_dict(self) -> dict[str, Any]:
        paths = self.paths
        tensors = {"states": paths.states, "energy": paths.energy, "weight": self.weight, "outputs": self.prior_outputs}
        return {"alpha": self.alpha, **tensors}

    @classmethod
    def from_state(cls, prior: Prior, state: dict[str, Any]) -> HeldOut:
        kept = {name: state[name].to(prior.device) for name in ("states", "energy", "weight", "outputs")}
        return cls(prior, Trajectories(kept["states"], energy=kept["energy"]), kept["weight"], state["alpha"], kept["outputs"])

    @torch.no_grad()
    def gain(self, policy: Denoiser) -> tuple[float, float]:
        """(nats by which the policy's EUBO is below the prior's, its standard error)."""
        prior, paths, known = self.prior, self.paths, self.prior_outputs
        ratio = step_log_ratio(prior.chain, prior.denoiser, policy, paths, prior_outputs=known).sum(0).double()
        mean = (self.weight * ratio).sum()
        return mean.item(), math.sqrt((self.weight * (ratio - mean)).square().sum().item())


class Kept:
    """The weights that came closest to the target so far, and by how much they are closer than the prior, nats.

    falls: offers in a row that lay clearly below it.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.nats, self.falls = [weight.clone() for weight in weights], 0.0, 0

    def offer(self, nats: float, weights: list[Tensor], slack: float = 0.0) -> None:
        """Keep ``weights`` if they are closer; ``slack``: nats that an offer may lie below without counting as a fall."""
        if nats > self.nats:
            self.nats, self.falls = nats, 0
            for own, weight in zip(self.weights, weights, strict=True):
                own.copy_(weight)
        else:
            self.falls = self.falls + 1 if not nats >= self.nats - slack else 0

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "nats": self.nats, "falls": self.falls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nats, self.falls = state["nats"], state["falls"]
        for own, weight in zip(self.weights, state["weights"], strict=True):
            own.copy_(weight)
