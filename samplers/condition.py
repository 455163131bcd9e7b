"""What trajectories are conditioned on: a table with a row for each condition, and the row of each trajectory.

The target is one law for each condition c: p_prior(x|c) · exp(-E(x, c)/alpha) / Z(c). So what is one number for a law (log Z, a
baseline, the weights of a softmax) is one number for each row of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .shapes import Index
from .typed import integers


@dataclass(frozen=True, eq=False)
class ConditionTable:
    """G conditions.

    names: what each one is called ("label 3"). tensors: by name, what the network is called with, under the names of its
    own arguments ("class_labels"; `guidance.guided` says more of them). only_energies: {name: G values}, what no network sees
    ("prompts").

    Errors: ValueError for a table without rows, a name that stands twice, and columns without G rows.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Shaped[Tensor, " conditions ..."]] = field(default_factory=dict[str, Tensor])
    only_energies: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a table of conditions without a row; give at least one condition.")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"the condition {twice[0]} stands twice; name each one once.")
        for name, column in {**self.tensors, **self.only_energies}.items():
            if len(column) != len(self.names):
                raise ValueError(f"{name} has {len(column)} rows for {len(self.names)} conditions; give one for each.")

    def __len__(self) -> int:
        return len(self.names)

    def in_turn(self, count: int, device: torch.device) -> Condition:
        """``count`` trajectories, each of the next condition, from the first one on."""
        return Condition(self, torch.arange(count, device=device) % len(self))

    def only(self, row: int) -> ConditionTable:
        """The table of this row alone."""
        return ConditionTable(
            (self.names[row],),
            {name: column[row : row + 1] for name, column in self.tensors.items()},
            {name: column[row : row + 1] for name, column in self.only_energies.items()},
        )


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of trajectories. group: the row of the table that each one has.

    A network reads the tensors and never the row: `Policy.only` gives it a table of one row.
    """

    table: ConditionTable
    group: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.group)

    def select(self, index: Index | slice) -> Condition:
        """Those of the trajectories at ``index``."""
        return Condition(self.table, self.group[index])

    def network_inputs(self) -> dict[str, Shaped[Tensor, " batch ..."]]:
        """By name, on the device of ``group``, as the network takes them; the table may lie elsewhere."""
        return self._rows(self.table.tensors)

    def context(self) -> dict[str, Any]:
        """{name: N values}: what an energy may ask for; of the network's inputs those of one number each, not embeddings."""
        rows = integers(self.group)
        numbers = self._rows({name: column for name, column in self.table.tensors.items() if column.ndim == 1})
        return numbers | {name: [column[row] for row in rows] for name, column in self.table.only_energies.items()}

    def _rows(self, columns: Mapping[str, Shaped[Tensor, " conditions ..."]]) -> dict[str, Shaped[Tensor, " batch ..."]]:
        return {name: column[self.group.to(column.device)].to(self.group.device) for name, column in columns.items()}


def context_of(condition: Condition | None) -> dict[str, Any]:
    """What an energy may ask for besides the samples; nothing where there are no conditions."""
    return {} if condition is None else condition.context()


def selected(condition: Condition | None, index: Index | slice) -> Condition | None:
    """The conditions of the trajectories at ``index``; None where there are none."""
    return None if condition is None else condition.select(index)


def members(group: Index, count: int) -> list[Int[Tensor, " _"]]:
    """For each of ``count`` conditions the indices of those that have it."""
    return [(group == row).nonzero()[:, 0] for row in range(count)]
