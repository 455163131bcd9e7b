"""The frozen prior: a denoiser, the chain it is run with, and what its samples are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .chain import Chain
from .condition import Condition, ConditionTable
from .denoiser import as_denoiser
from .shapes import States


@dataclass(frozen=True)
class Source:
    """Where a prior was loaded from: enough to load it again, and to export a policy with what surrounds it.

    path: an absolute folder, or a hub id. pipeline: the class that model_index.json names, None for a bare model.
    denoiser: the subfolder of the denoiser, "" for a bare model.
    """

    path: str
    pipeline: str | None
    denoiser: str


class Prior:
    """A frozen denoiser and the chain it is run with: together they define p_prior, the law of what is sampled.

    shape: of one state, without the batch. to_data: maps terminal states to the samples an energy sees (a
    scale, or a latent decoder); the identity where None. data_variance: of the samples' widest direction, in units of the state;
    None where unknown. condition_table: what the network is conditioned on, each row with a law of its own; None for an
    unconditional one. `load_prior` also fills source, scheduler (the diffusers scheduler that the chain was read from),
    step_options (what its step takes besides, DDIM's eta), call_options (what the pipeline's call takes besides, its guidance)
    and decisions (what the loader decided, a line each).
    """

    def __init__(
        self,
        network: Any,
        chain: Chain,
        shape: tuple[int, ...],
        to_data: Callable[[States], Float[Tensor, " n *data"]] | None = None,
        *,
        condition_table: ConditionTable | None = None,
        source: Source | None = None,
        scheduler: Any = None,
        step_options: dict[str, float] | None = None,
        call_options: dict[str, Any] | None = None,
        decisions: tuple[str, ...] = (),
        data_variance: float | None = None,
    ) -> None:
        self.denoiser: Any = as_denoiser(network)
        self.chain = chain
        self.shape = tuple(shape)
        self.source, self.scheduler, self.decisions = source, scheduler, decisions
        self.step_options, self.call_options = step_options or {}, call_options or {}
        self.data_variance, self.condition_table = data_variance, condition_table
        self._to_data = to_data
        if isinstance(self.denoiser, nn.Module):
            self.denoiser.requires_grad_(False).eval()

    @property
    def decoder(self) -> Any:
        """What makes samples of terminal states; None where they are the samples."""
        return self._to_data

    @torch.no_grad()
    def to_data(self, state: States) -> Float[Tensor, " n *data"]:
        """What an energy sees of terminal states."""
        return state if self._to_data is None else self._to_data(state)

    @property
    def num_conditions(self) -> int:
        """How many laws this prior has: one for each condition, 1 without conditions."""
        return 1 if self.condition_table is None else len(self.condition_table)

    def condition(self, count: int) -> Condition | None:
        """The conditions of ``count`` trajectories, in turn; None for an unconditional prior."""
        return None if self.condition_table is None else self.condition_table.in_turn(count, self.device)

    def only(self, row: int) -> Prior:
        """The same prior with this condition alone; it shares the network."""
        assert self.condition_table is not None
        one = copy.copy(self)
        one.condition_table = self.condition_table.only(row)
        return one

    @property
    def device(self) -> torch.device:
        if isinstance(self.denoiser, nn.Module):
            for tensor in (*self.denoiser.parameters(), *self.denoiser.buffers()):
                return tensor.device
        return torch.device("cpu")
