"""Trajectories: what a behavior returns and everything above consumes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .condition import Condition, context_of, members, selected
from .shapes import AnyShape, Index

MOST_AT_ONCE = 2048
NUMBERS_AT_ONCE = 2**19
ON_A_CPU = 2**16  # from 32 MB on, a temporary is returned to the system after every operation, which halves the speed


def rows_at_once(shape: tuple[int, ...], device: torch.device) -> int:
    """How many states of this shape to run through a network at once: enough for speed, few enough for memory."""
    numbers = ON_A_CPU if device.type == "cpu" else NUMBERS_AT_ONCE
    return max(1, min(MOST_AT_ONCE, numbers // math.prod(shape)))


@dataclass(frozen=True, eq=False)
class Trajectories:
    """A batch of trajectories of one chain.

    states: float32 in training; states[0] the start and states[K] the terminal one.
    step_log_ratio: nats, log policy - log prior of the policy that drew them, or that they were compared with;
        None where unknown.
    log_behavior: nats, log behavior - log prior of the whole trajectory, up to one constant for the batch; None where
        the density is unknown (noised-back and user samples).
    energy: None until evaluated.
    condition: what each one is conditioned on, or None.
    prior_outputs: of the prior's network at the states that trained steps lead from, where they are kept.
    """

    states: Float[Tensor, " states batch *state"]
    step_log_ratio: Float[Tensor, " kernels batch"] | None = None
    log_behavior: Float[Tensor, " batch"] | None = None
    energy: Float[Tensor, " batch"] | None = None
    condition: Condition | None = None
    prior_outputs: Float[Tensor, " kernels batch *state"] | None = None

    @cached_property
    def group(self) -> Int[Tensor, " batch"]:
        """The row of each one's condition, 0 where there are no conditions."""
        if self.condition is None:
            return torch.zeros(len(self), dtype=torch.long, device=self.states.device)
        return self.condition.group

    @cached_property
    def groups(self) -> list[Int[Tensor, " _"]]:
        """The indices of the trajectories of each condition: each has a law of its own. One entry without conditions."""
        return members(self.group, 1 if self.condition is None else len(self.condition.table))

    @property
    def context(self) -> dict[str, Any]:
        """{name: one value for each}: what an energy may ask for besides the samples."""
        return context_of(self.condition)

    @property
    def terminal(self) -> Float[Tensor, " batch *state"]:
        """Terminal states; `Prior.to_data` makes samples of them."""
        return self.states[-1]

    def __len__(self) -> int:
        return self.states.shape[1]

    def select(self, index: Index) -> Trajectories:
        """The trajectories at ``index``, with everything that belongs to them."""
        return Trajectories(
            states=self.states[:, index],
            step_log_ratio=None if self.step_log_ratio is None else self.step_log_ratio[:, index],
            log_behavior=None if self.log_behavior is None else self.log_behavior[index],
            energy=None if self.energy is None else self.energy[index],
            condition=selected(self.condition, index),
            prior_outputs=None if self.prior_outputs is None else self.prior_outputs[:, index],
        )

    def with_(self, **changes: Any) -> Trajectories:
        return replace(self, **changes)


def concatenate(parts: list[Trajectories]) -> Trajectories:
    """One batch from several; a field survives only where every part has it."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str, dim: int) -> AnyShape | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else torch.cat(values, dim)

    return Trajectories(
        states=torch.cat([part.states for part in parts], 1),
        step_log_ratio=join("step_log_ratio", 1),
        log_behavior=join("log_behavior", 0),
        energy=join("energy", 0),
        condition=_joined([part.condition for part in parts]),
        prior_outputs=join("prior_outputs", 1),
    )


def _joined(conditions: list[Condition | None]) -> Condition | None:
    known = [condition for condition in conditions if condition is not None]
    if len(known) < len(conditions):
        return None
    return Condition(known[0].table, torch.cat([condition.group for condition in known]))
