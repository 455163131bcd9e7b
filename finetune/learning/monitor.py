"""What a policy is worth beside its prior: watched within a phase, judged at its end, and the best weights kept."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...samplers.condition import members
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ...samplers.trajectory import Trajectories
from ..distributed.processes import Processes
from ..distributed.signals import uninterrupted
from ..energies.evaluation import EnergyEvaluation
from ..populations.held_out import HeldOut, Look
from ..populations.population import Population
from .improvement import Improvement
from .kept import ALIKE, Kept
from .noise import Noise
from .optimization import Optimization

JUDGED, EACH = 256, 16  # rollouts that show what a phase has reached: of all conditions, of each one


class Monitor:
    """Looks at the policy on held-out paths, which nothing is learned from, and on rollouts of its own.

    watched: the last weights of the warm start of which none before are clearly better, by the held-out paths alone. closest: the
    best of the ends of phases, the prior at first. improvement: how much closer than the prior they are; None before anything was
    judged.
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
        return self._summary(held_out.look(self.policy))

    def _summary(self, look: Look) -> dict[str, float]:
        eubo, gain = self.processes.mean(look.eubo), self.processes.mean(look.gain)
        return {"eubo": eubo, "gain": gain, "eubo_se": self._error(look.error)}

    def _error(self, error: float) -> float:
        """That of a mean over the processes."""
        return self.processes.mean(error) / math.sqrt(self.processes.count)

    @torch.no_grad()
    def watch(self, held_out: HeldOut | None) -> dict[str, float]:
        """`look` at the policy as it would be if the phase ended here, which is kept unless an earlier one was clearly better.

        That is more than a standard error of what it was better by on the same paths, path by path. What all policies have in
        common falls out there, so that it is smaller than the error of either's gain.
        """
        with self.optimization.averaged():
            self.processes.refuse_other_weights(self.optimization.weights)
            if held_out is None:
                return {}
            look = held_out.look(self.policy)
            found, apart = self._summary(look), self._error(held_out.error(look.by_path - held_out.best))
            self.watched.offer(found["gain"], self.optimization.weights, slack=found["eubo_se"], alike=apart)
            if self.watched.nats == found["gain"]:
                held_out.best = look.by_path
        return found

    def judged(self, global_step: int) -> bool:
        """Whether the policy of this step has been judged."""
        return self._judged_at == global_step

    def judge(self, phase: str, global_step: int, held_out: HeldOut, population: Population) -> None:
        """How much closer than the prior the policy is by held-out paths and new rollouts; kept if nothing was clearly closer.

        All policies of a run are judged by the same noise, so that of two that hardly differ neither has the luckier rollouts.
        What is the closest already, the prior itself at first, is not judged again.
        """
        paths = population.prior_paths
        drawn = None if self._is_closest() else self._rollouts()
        # One ceiling, the prior paths', for both sides and all judgements.
        (energy, valid), *policy_side = self.energies.cut_alike(paths, *([] if drawn is None else [drawn]))
        own = [-side / self.alpha for side in self._by_condition(energy, valid, paths.group)]
        # A tilt that is steeper by the reach has a gap that is larger by its square, if log h is linear.
        reach, count = held_out.times, len(own)
        level = sum(side.mean().item() for side in own) / count
        gap_prior = reach**2 * (self.processes.mean(held_out.eubo) - level / reach)
        if drawn is None:
            self.improvement = self.improvement or Improvement(0.0, 0.0, gap_prior, "prior", reach)
            self._judged_at = global_step
            return
        looks, log_weights = held_out.look_by_condition(self.policy), self._log_weight(drawn, *policy_side[0])
        each = [self._gained(*sides) for sides in zip(looks, log_weights, own, strict=True)]
        nats, se = sum(one[0] for one in each) / count, math.hypot(*(one[1] for one in each)) / count
        table = self.prior.condition_table
        by_condition = {} if table is None or count == 1 else dict(zip(table.names, each, strict=True))
        with uninterrupted():  # the weights that are kept, and what is said of them, belong together
            if self.closest.offer(nats, self.optimization.weights, alike=ALIKE):
                self.improvement = Improvement(nats, se, gap_prior, phase, reach, by_condition)
            elif self.improvement is None or self.improvement.nats < nats < 0:
                self.improvement = Improvement(nats, se, gap_prior, "prior", reach, by_condition)
            self._judged_at = global_step

    def _gained(self, look: Look, log_weight: Float[Tensor, " n"], own: Float[Tensor, " m"]) -> tuple[float, float]:
        """(nats by which the policy is closer than the prior, standard error) of one condition."""
        gain = self.processes.mean(look.gain)
        nats = gain + (log_weight.mean() - own.mean()).item()
        sides = [side.std().item() / math.sqrt(len(side)) for side in (log_weight, own)]
        return nats if math.isfinite(nats) else -math.inf, math.hypot(self._error(look.error), *sides)

    def _by_condition(
        self, value: Float[Tensor, " batch"], valid: Bool[Tensor, " batch"], group: Int[Tensor, " batch"]
    ) -> list[Float[Tensor, " _"]]:
        """The valid values of all processes, those of each condition."""
        every, groups = self.processes.gather(value.masked_fill(~valid, math.nan)).double(), self.processes.gather(group)
        parts = [every[index] for index in members(groups, self.prior.num_conditions)]
        return [part[~part.isnan()] for part in parts]

    def _is_closest(self) -> bool:
        pairs = zip(self.optimization.weights, self.closest.weights, strict=True)
        return self.processes.mean(float(all(torch.equal(weight, kept) for weight, kept in pairs))) == 1.0

    def _rollouts(self) -> Trajectories:
        """New ones of the policy, with their energies."""
        conditions = self.prior.num_conditions
        count = max(2 * conditions, max(JUDGED, EACH * conditions) // self.processes.count)
        noise = self.noise.fresh("judging")
        drawn = rollout(self.prior, self.policy, count, noise, keep=False, on_step=self.processes.poll)
        return self.energies.evaluate(drawn)

    def _log_weight(
        self, drawn: Trajectories, energy: Float[Tensor, " batch"], valid: Bool[Tensor, " batch"]
    ) -> list[Float[Tensor, " _"]]:
        """Log-weights of rollouts, those of all processes, for each condition."""
        assert drawn.step_log_ratio is not None
        return self._by_condition(-energy / self.alpha - drawn.step_log_ratio.sum(0), valid, drawn.group)

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
