"""The temperature of the updates: it falls to the configured one as fast as the policy can follow."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...samplers.condition import members
from ..config.train import TrainConfig
from ..distributed.processes import Processes
from ..estimators import adequate_alpha
from ..populations.population import Population
from .batch import Batch
from .log_z import LogZ

ENOUGH = 4.0  # effective trajectories of a condition, at the share that is asked for, from which on its own share counts


class Temperature:
    """alpha: of the current update, for all ``conditions``; infinite before the first one of a tempered run."""

    def __init__(self, config: TrainConfig, processes: Processes, conditions: int) -> None:
        self.config, self.processes, self.conditions = config, processes, conditions
        self.alpha = self._first = config.alpha
        self.settle()

    def begin(self, reached: float = math.inf) -> None:
        """The updates begin. reached: the temperature that a warm start has come down to; above it the policy would unlearn."""
        self.alpha = self._first = reached if self.config.tempering_ess else self.config.alpha

    def lower(self, batch: Batch, on_policy: int, progress: float, log_z: LogZ, population: Population | None) -> None:
        """Lower alpha as far as the policy's own weights keep ``tempering_ess`` of the batch's first ``on_policy`` effective.

        It also falls at least geometrically from its first value to the configured one, which it reaches at half of the
        run (``progress`` .5): a target that no policy can meet at this number of steps would otherwise hold it for good. A
        learned log Z belongs to a temperature, and moves along with the prior's own estimate.
        """
        if self.alpha <= self.config.alpha:
            return
        before = self.alpha
        wanted = self.processes.mean(self._adequate(batch, on_policy))
        if math.isinf(before):
            self._first = wanted
        else:
            bound = math.log(self.config.alpha)
            if progress < 0.5:
                bound += (1 - 2 * progress) * (math.log(self._first) - bound)
            wanted = min(wanted, before, math.exp(bound))
        self.alpha = max(self.config.alpha, wanted)
        if population is not None and self.alpha != before:
            old = self.config.alpha if math.isinf(before) else before
            log_z.move(self.processes.mean_of(population.log_z(self.alpha).double() - population.log_z(old).double()))

    def _adequate(self, batch: Batch, on_policy: int) -> float:
        """The smallest temperature, from the configured one up, that keeps ``tempering_ess`` of the batch effective, of the
        condition for which it is the least."""
        alpha, target = self.config.alpha, self.config.tempering_ess
        if target is None or not on_policy:
            return alpha
        ratio, energy = batch.log_ratio.detach(), batch.energy
        # A masked energy is a placeholder, which could outweigh every real one.
        known = batch.valid & (torch.arange(len(energy), device=energy.device) < on_policy)
        if self.conditions == 1:
            return adequate_alpha(energy[known], alpha, target, ratio[known])
        gather = self.processes.gather
        assert batch.group is not None
        ratio, energy, known, group = (gather(each) for each in (ratio, energy, known, batch.group))
        own = [index[known[index]] for index in members(group, self.conditions)]
        large = [index for index in own if len(index) * target >= ENOUGH]
        found = [adequate_alpha(energy[index], alpha, target, ratio[index]) for index in large]
        if not large:  # taken together, each condition less its own mean: of so few, one alone is always effective
            level = energy.clone()
            for index in own:
                level[index] -= energy[index].mean()
            found = [adequate_alpha(level[known], alpha, target, ratio[known])]
        return max(found)

    def settle(self) -> None:
        """A step is complete: `state_dict` is of now."""
        self._settled = {"alpha": self.alpha, "first": self._first}

    def state_dict(self) -> dict[str, Any]:
        return self._settled

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alpha, self._first = state_dict["alpha"], state_dict["first"]
        self.settle()
