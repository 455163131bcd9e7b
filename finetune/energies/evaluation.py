"""The energies of trajectories: evaluated once, on decoded samples, counted, and alike on all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
FEWEST, APART = 0.02, 10.0  # share of a batch that penalties may leave, and how many of its widths they are away


def ceiling_of(energy: Tensor, room: float) -> float:
    """Of finite energies [n]: ``room`` above their lowest tenth, or four times that tenth's own width where this is more.

    What lies beyond a gap of more than ``room`` and of ten times the width of all below it is a penalty, and has no part in this.
    """
    order = energy.sort().values
    apart = order.diff() > (APART * (order - order[0])[:-1]).clamp(min=room)
    apart[: math.ceil(FEWEST * len(order)) - 1] = False  # one lucky sample does not make penalties of all others
    if apart.any():
        order = order[: int(apart.nonzero()[0]) + 1]
    low = order.quantile(LOW).item()
    return low + max(room, WIDTHS * (low - order[0].item()))


def _first_known(found: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    return [other if one is None else one for one, other in zip(found, others, strict=True)]


class EnergyEvaluation:
    """Gives trajectories their energies. All processes call its methods, in the same order.

    meter: calls the energy, counts and checks. cap: E/alpha in training is at most so far above the lowest tenth of what the
    policy drew in the same batch, of the same condition, or further where that tenth itself is wide (`ceiling_of`).
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
        it, and lead it back to the prior. Where they have no finite energy, it is that of the whole batch, and then the last one.

        Errors: EnergyError where no batch has had a finite energy of some condition.
        """
        part = trajectories.select(torch.arange(own, device=trajectories.states.device)) if own else trajectories
        found = self._ceilings(part)
        if None in found and part is not trajectories:
            found = _first_known(found, self._ceilings(trajectories))
        if self._ceiling is not None:
            found = _first_known(found, self._ceiling)
        if None in found:
            table = self.prior.condition_table
            of = "" if table is None else f" of {table.names[found.index(None)]}"
            raise EnergyError(
                f"every energy{of} of the first batch is +inf or invalid: the target has no mass where the prior samples."
                " Soften the constraint, or raise alpha."
            )
        self._ceiling = [ceiling for ceiling in found if ceiling is not None]
        return self._cut(trajectories, self._ceiling)

    def cut_alike(self, *parts: Trajectories) -> list[tuple[Tensor, Tensor]]:
        """(finite energies, valid mask) of each, all cut at the ceiling of the first: what is compared has one ceiling."""
        ceilings = [math.inf if ceiling is None else ceiling for ceiling in self._ceilings(parts[0])]
        return [self._cut(part, ceilings) for part in parts]

    def _cut(self, trajectories: Trajectories, ceilings: list[float]) -> tuple[Tensor, Tensor]:
        assert trajectories.energy is not None
        capped = trajectories.energy.nan_to_num(nan=0.0, posinf=math.inf)
        for index, ceiling in zip(trajectories.groups, ceilings, strict=True):
            capped[index] = capped[index].clamp(max=ceiling)
        return capped, ~trajectories.energy.isnan()

    def _ceilings(self, trajectories: Trajectories) -> list[float | None]:
        """Of each condition, from the finite energies of all processes; None where there are none."""
        assert trajectories.energy is not None
        energy, group = self.processes.gather(trajectories.energy), self.processes.gather(trajectories.group)
        finite = [energy[index][energy[index].isfinite()] for index in members(group, len(trajectories.groups))]
        return [ceiling_of(some, self._room) if len(some) else None for some in finite]

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
