"""The soft value that is learned along with the policy, for objectives on parts of a path."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.prior import Prior
from ...samplers.trajectory import Trajectories
from ...samplers.typed import backward
from ..distributed.processes import Processes
from .path_data import PathData
from .soft_value import SoftValue

LEARNING_RATE = 1e-3
VALUE_STEPS = 6  # an update: with one, the value lags behind a policy that it is to tell where to go
ROWS = 8192  # states at once


class Critic:
    """log h_k(s_k), nats, by the mean of both networks of a soft value, which goes on learning from what an objective asks.

    It starts as the population's soft value, that of the first process where there are several: all hold the same weights. At
    another temperature than that one's (tempering, few effective paths) log h is taken to grow with 1/alpha, and learns the rest.
    """

    def __init__(self, prior: Prior, alpha: float, processes: Processes) -> None:
        self.prior, self.alpha, self.processes = prior, alpha, processes
        self._value: SoftValue | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def value(self) -> SoftValue | None:
        """As it is now; None before the updates of a horizon."""
        return self._value

    def begin(self, value: SoftValue) -> None:
        """Start from a population's soft value, which stays as it is."""
        state = value.state_dict()
        networks = [{name: self.processes.gather(tensor[None])[0] for name, tensor in one.items()} for one in state["networks"]]
        # Which half of the population each of them saw says nothing any more.
        self._take(state | {"networks": networks, "half": state["half"][:0]})

    def _take(self, value: dict[str, Any]) -> None:
        prior = self.prior
        copied = SoftValue.from_state_dict(value, prior.shape, prior.chain.last_trained + 1, prior.device)
        weights = [weight.requires_grad_(True) for network in copied.networks for weight in network.parameters()]
        self._value, self._optimizer = copied, torch.optim.Adam(weights, LEARNING_RATE)

    def _rows(self, data: PathData, alpha: float, first: int) -> Float[Tensor, " rows"]:
        """Of the rows (k, b) from ``first`` on, at most `ROWS`, with a graph where one is kept."""
        assert self._value is not None
        count, chain = len(data.paths), self.prior.chain
        row = torch.arange(first, min(first + ROWS, count * chain.num_kernels), device=self.prior.device)
        step, path = chain.step_of_row(row // count), row % count
        seen, group = data(step, path), data.paths.group[path]
        one, two = (network(seen, step, group) for network in self._value.networks)
        return 0.5 * (one + two) * (self._value.times * self.alpha / alpha)

    @torch.no_grad()
    def __call__(self, trajectories: Trajectories, alpha: float) -> Float[Tensor, "kernels batch"]:
        """Of the states that trained steps lead from, at this temperature."""
        shape, data = (self.prior.chain.num_kernels, len(trajectories)), PathData(self.prior, trajectories)
        parts = [self._rows(data, alpha, first) for first in range(0, shape[0] * shape[1], ROWS)]
        return torch.cat(parts).view(shape)

    def step(self, trajectories: Trajectories, alpha: float, gradient: Float[Tensor, "kernels batch"]) -> None:
        """One step of Adam along dL/d(log h). gradient: this process's columns times the number of processes, as pass 1 gives
        it."""
        assert self._optimizer is not None
        flat, data = gradient.flatten(), PathData(self.prior, trajectories)
        for first in range(0, len(flat), ROWS):
            backward(self._rows(data, alpha, first), flat[first : first + ROWS])
        for group in self._optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad = self.processes.mean_of(weight.grad.flatten()).view_as(weight)
        self._optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        if self._value is None or self._optimizer is None:
            return {"value": None, "optimizer": None}
        return {"value": self._value.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["value"] is not None:
            self._take(state_dict["value"])
            assert self._optimizer is not None
            self._optimizer.load_state_dict(state_dict["optimizer"])
