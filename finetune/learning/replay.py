"""What the policy drew in the last updates, to be learned from again."""

from __future__ import annotations

from typing import Any

import torch

from ...samplers.condition import Condition
from ...samplers.prior import Prior
from ...samplers.trajectory import Trajectories, concatenate

UPDATES = 8  # whose trajectories are kept


class Replay:
    """The policy's own trajectories of the last `UPDATES` updates, on the device, with their energies.

    Each keeps log_behavior, the density of the policy that drew it, so that an objective may weight it by what it would be now.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self._kept: list[Trajectories] = []
        self.settle()

    @property
    def empty(self) -> bool:
        return not self._kept

    def add(self, drawn: Trajectories) -> None:
        """Of one update; the oldest one's are given up where there are too many."""
        self._kept = [*self._kept[1 - UPDATES :], drawn.with_(step_log_ratio=None)]

    def draw(self, count: int, generator: torch.Generator) -> Trajectories:
        """With replacement, each of a condition with the same probability; as many of each condition."""
        device = self._kept[0].states.device
        chance = torch.rand(count, generator=generator, device=device)
        number = len(self._kept[0].groups)
        parts: list[Trajectories] = []
        for row in range(number):
            own = [one.groups[row] for one in self._kept]
            ends = torch.tensor([len(members) for members in own], device=device).cumsum(0)
            place = (chance[row::number] * ends[-1]).long().clamp(max=int(ends[-1]) - 1)
            part = torch.searchsorted(ends, place, right=True)
            for index, (one, members) in enumerate(zip(self._kept, own, strict=True)):
                mine = place[part == index] - (ends[index] - len(members))
                if len(mine):
                    parts.append(one.select(members[mine]))
        return concatenate(parts)

    def settle(self) -> None:
        """A step is complete: `state_dict` is of now."""
        self._settled = self._kept

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [_saved(one) for one in self._settled]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = [self._loaded(one) for one in state_dict["kept"]]
        self.settle()

    def _loaded(self, saved: dict[str, Any]) -> Trajectories:
        found: dict[str, Any] = {name: None if value is None else value.to(self.prior.device) for name, value in saved.items()}
        group, table = found.pop("group"), self.prior.condition_table
        return Trajectories(**found, condition=None if group is None or table is None else Condition(table, group))


def _saved(drawn: Trajectories) -> dict[str, Any]:
    names = ("states", "log_behavior", "energy", "prior_outputs")
    group = None if drawn.condition is None else drawn.condition.group
    return {**{name: getattr(drawn, name) for name in names}, "group": group}
