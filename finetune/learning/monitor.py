"""What a policy is worth beside its prior: watched within a phase, judged at its end, and the best weights kept."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ..distributed.processes import Processes
from ..distributed.signals import uninterrupted
from ..energies.evaluation import EnergyEvaluation
from ..populations.held_out import HeldOut
from ..populations.population import Population
from .improvement import Improvement
from .kept import ALIKE, Kept
from .noise import Noise
from .optimization import Optimization

JUDGED = 256  # rollouts that show what a phase has reached


class Monitor:
    """Looks at the policy on held-out paths, which nothing is learned from, and on rollouts of its own.

    watched: the best weights within the warm start, by the held-out paths alone. closest: the best of the ends of phases, the
    prior at first. improvement: how much closer than the prior they are; None before anything was judged.
    """

    def __init__(
        self,
        prior: Prior,
        policy: nn.Module,
        alpha: float,
        optimization: Optimization,
        energies: EnergyEvaluation,
        noise: Noise,
        processes: Processes,
    ) -> None:
        self.prior, self.policy, self.alpha = prior, policy, alpha
        self.optimization, self.energies, self.noise, self.processes = optimization, energies, noise, processes
        self.watched, self.closest = Kept(optimization.weights), Kept(optimization.weights)
        self.improvement: Improvement | None = None
        self._judged_at = -1  # the step after which the policy was last judged

    @torch.no_grad()
    def look(self, held_out: HeldOut | None) -> dict[str, float]:
        """On the held-out paths: EUBO and gain (`Look`), with the standard error of the gain; no energy calls."""
        self.processes.refuse_other_weights(self.optimization.weights)
        if held_out is None:
            return {}
        eubo, gain, error = (self.processes.mean(value) for value in held_out.look(self.policy))
        return {"eubo": eubo, "gain": gain, "eubo_se": error / math.sqrt(self.processes.count)}

    @torch.no_grad()
    def watch(self, held_out: HeldOut | None) -> dict[str, float]:
        """`look` at the policy as it would be if the phase ended here, which is kept if it is the best."""
        with self.optimization.averaged():
            found = self.look(held_out)
            if held_out is not None:
                self.watched.offer(found["gain"], self.optimization.weights, slack=found["eubo_se"])
        return found

    def judged(self, global_step: int) -> bool:
        """Whether the policy of this step has been judged."""
        return self._judged_at == global_step

    def judge(self, phase: str, global_step: int, held_out: HeldOut, population: Population) -> None:
        """How much closer than the prior the policy is by held-out paths and new rollouts; kept if nothing was clearly closer.

        All policies of a run are judged by the same noise, so that of two that hardly differ neither has the luckier rollouts.
        What is the closest already, the prior itself at first, is not judged again.
        """
        own = -self.processes.gather_valid(*self.energies.capped(population.trajectories)).double() / self.alpha
        # A tilt that is steeper by the reach has a gap that is larger by its square, if log h is linear.
        reach, conditions = held_out.times, self.prior.num_conditions
        gap_prior = reach**2 * (self.processes.mean(held_out.eubo) - own.mean().item() / reach)
        if self._is_closest():
            self.improvement = self.improvement or Improvement(0.0, 0.0, gap_prior, "prior", reach, conditions)
            self._judged_at = global_step
            return
        log_weight = self._log_weight()
        _, gain, error = (self.processes.mean(value) for value in held_out.look(self.policy))
        nats = gain + (log_weight.mean() - own.mean()).item()
        nats = nats if math.isfinite(nats) else -math.inf
        sides = [side.std().item() / math.sqrt(len(side)) for side in (log_weight, own)]
        se = math.hypot(error / math.sqrt(self.processes.count), *sides)
        with uninterrupted():  # the weights that are kept, and what is said of them, belong together
            if self.closest.offer(nats, self.optimization.weights, alike=ALIKE):
                self.improvement = Improvement(nats, se, gap_prior, phase, reach, conditions)
            elif self.improvement is None or self.improvement.nats < nats < 0:
                self.improvement = Improvement(nats, se, gap_prior, "prior", reach, conditions)
            self._judged_at = global_step

    def _is_closest(self) -> bool:
        pairs = zip(self.optimization.weights, self.closest.weights, strict=True)
        return self.processes.mean(float(all(torch.equal(weight, kept) for weight, kept in pairs))) == 1.0

    def _log_weight(self) -> Float[Tensor, " n"]:
        """Log-weights of new rollouts of the policy, those of all processes."""
        count = max(2, JUDGED // self.processes.count)
        noise = self.noise.fresh("judging")
        drawn = rollout(self.prior, self.policy, count, noise, keep=False, on_step=self.processes.poll)
        drawn = self.energies.evaluate(drawn)
        assert drawn.step_log_ratio is not None
        energy, valid = self.energies.capped(drawn)
        return self.processes.gather_valid(-energy / self.alpha - drawn.step_log_ratio.sum(0), valid).double()

    # --- its state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "watched": self._saved(self.watched),
            "closest": self._saved(self.closest),
            "improvement": None if self.improvement is None else asdict(self.improvement),
            "judged_at": self._judged_at,
        }

    def _saved(self, kept: Kept) -> dict[str, Any]:
        state = kept.state_dict()
        return {**state, "weights": [self.processes.saved(weight) for weight in state["weights"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trained = self.optimization.weights
        for kept, saved in ((self.watched, state_dict["watched"]), (self.closest, state_dict["closest"])):
            weights = [self.processes.shard(one, like) for one, like in zip(saved["weights"], trained, strict=True)]
            kept.load_state_dict({**saved, "weights": weights})
        self.improvement = None if state_dict["improvement"] is None else Improvement(**state_dict["improvement"])
        self._judged_at = state_dict["judged_at"]
