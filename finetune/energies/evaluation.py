"""The energies of trajectories: evaluated once, on decoded samples, counted, and alike on all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...samplers.condition import members
from ...samplers.prior import Prior
from ...samplers.trajectory import Trajectories
from ..distributed.processes import Processes
from .energy import Energy, EnergyMeter, overlaps
from .error import EnergyError

COUNTED = {  # by the energy meter, as metrics call it
    "calls": "energy_calls",
    "cache_hits": "energy_cache_hits",
    "invalid": "invalid_energies",
    "forbidden": "forbidden_energies",
}
LOW, WIDTHS = 0.1, 4.0  # the lowest share of a batch, and how many of its widths the ceiling leaves room for at least


class EnergyEvaluation:
    """Gives trajectories their energies. All processes call its methods, in the same order.

    meter: calls the energy, counts and checks. cap: E/alpha in training is at most so far above the lowest tenth of what the
    policy drew in the same batch, of the same condition, or further where that tenth itself is wide (`_ceiling_of`).
    """

    def __init__(
        self, prior: Prior, energy: Energy, processes: Processes, *, alpha: float, cap: float, max_invalid: float
    ) -> None:
        self.prior, self.processes, self.meter = prior, processes, EnergyMeter(energy, max_invalid)
        self._room = cap * alpha
        self._ceiling: list[float] | None = None  # of the last batch, one for each condition
        self.settle()

    def evaluate(self, trajectories: Trajectories) -> Trajectories:
        """``trajectories`` with their energies."""
        [(_, evaluated)] = self.evaluate_each([("", trajectories)])
        return evaluated

    def evaluate_each(self, drawn: Iterable[tuple[str, Trajectories]]) -> Iterator[tuple[str, Trajectories]]:
        """`evaluate` of each; where the energy `overlaps`, the next one is drawn while it works."""
        waiting: tuple[str, Callable[[], Trajectories]] | None = None
        for name, trajectories in drawn:
            if waiting is not None:
                yield waiting[0], waiting[1]()
            waiting = name, self._start(trajectories)
            if not overlaps(self.meter.energy):
                yield name, waiting[1]()
                waiting = None
        if waiting is not None:
            yield waiting[0], waiting[1]()

    def _start(self, trajectories: Trajectories) -> Callable[[], Trajectories]:
        """Returns at once what will return the trajectories with their energies: one batch at a time."""
        if trajectories.energy is not None:
            return lambda: trajectories
        started: Callable[[], Tensor] | None = None
        with self.processes.together():
            samples = self.prior.to_data(trajectories.terminal)
            started = self.meter.start(samples, **trajectories.context)

        def finish() -> Trajectories:
            assert started is not None
            energy = torch.empty(0)
            with self.processes.together():
                energy = started()
            self.processes.poll()
            return trajectories.with_(energy=energy)

        return finish

    def capped(self, trajectories: Trajectories, own: int | None = None) -> tuple[Tensor, Tensor]:
        """(finite energies, valid mask) [B]: +inf and what lies above the ceiling is set to it, NaN is masked.

        own: the first so many are the policy's; all of them, where None or 0. The ceiling is theirs and of this batch. Above one
        that others or an earlier policy had set, all that the policy draws could lie: training would then see no difference in
        it, and lead it back to the prior.

        Errors: EnergyError where no batch has had a finite energy of some condition.
        """
        energy, groups = trajectories.energy, trajectories.groups
        assert energy is not None
        valid = ~energy.isnan()
        mine = slice(0, own or None)
        drawn, group = self.processes.gather(energy[mine]), self.processes.gather(trajectories.group[mine])
        finite = [drawn[index][drawn[index].isfinite()] for index in members(group, len(groups))]
        last: list[float | None] = [None] * len(groups) if self._ceiling is None else [*self._ceiling]
        found = [self._ceiling_of(some) if len(some) else before for some, before in zip(finite, last, strict=True)]
        if None in found:
            table = self.prior.condition_table
            of = "" if table is None else f" of {table.names[found.index(None)]}"
            raise EnergyError(
                f"every energy{of} of the first batch is +inf or invalid: the target has no mass where the prior samples."
                " Soften the constraint, or raise alpha."
            )
        self._ceiling = [ceiling for ceiling in found if ceiling is not None]
        capped = energy.nan_to_num(nan=0.0, posinf=math.inf)
        for index, ceiling in zip(groups, self._ceiling, strict=True):
            capped[index] = capped[index].clamp(max=ceiling)
        return capped, valid

    def _ceiling_of(self, energy: Tensor) -> float:
        """Of the policy's finite energies. Penalties lie above the lowest tenth, so that its width is that of other energies."""
        low = energy.quantile(LOW).item()
        return low + max(self._room, WIDTHS * (low - energy.min().item()))

    def counts(self) -> dict[str, int]:
        """What the meters of all processes have counted, by the names of the metrics."""
        totals = self.processes.gather(self._counted(self._mine())).sum(0).tolist()
        return dict(zip(COUNTED.values(), totals, strict=True))

    def _mine(self) -> list[int]:
        return [getattr(self.meter, name) for name in COUNTED]

    def _counted(self, counts: list[int]) -> Tensor:
        return torch.tensor([counts], device=self.processes.device)

    def settle(self) -> None:
        """A step is complete: `state_dict` is of now."""
        self._settled = self._mine(), self._ceiling

    def state_dict(self) -> dict[str, Any]:
        """Of all processes: what each has counted, and the ceiling that they share."""
        counts, ceiling = self._settled
        return {"counts": self.processes.gather(self._counted(counts)).tolist(), "ceiling": ceiling}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """On another number of processes, the first one goes on with what all had counted."""
        counts, rank = state_dict["counts"], self.processes.rank
        if len(counts) == self.processes.count:
            mine = counts[rank]
        else:
            mine = [sum(column) for column in zip(*counts, strict=True)] if self.processes.main else [0] * len(COUNTED)
        for name, count in zip(COUNTED, mine, strict=True):
            setattr(self.meter, name, count)
        self._ceiling = state_dict["ceiling"]
        self.settle()
