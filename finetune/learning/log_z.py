"""The learned log Z, with an optimizer of its own."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.typed import floats


class LogZ:
    """parameter, one for each condition: what `rtb` and `trust_pcl` learn; V(s_0) = alpha · log_z follows from it."""

    def __init__(self, count: int, learning_rate: float, device: torch.device) -> None:
        self.parameter: Float[Tensor, " conditions"] = torch.zeros(count, device=device, requires_grad=True)
        self._optimizer: torch.optim.Optimizer = torch.optim.Adam([self.parameter], learning_rate)
        self.settle()

    @torch.no_grad()
    def set(self, value: Float[Tensor, " conditions"]) -> None:
        """Set the parameter."""
        self.parameter.copy_(value)

    @torch.no_grad()
    def move(self, by: Float[Tensor, " conditions"]) -> None:
        """Along with the temperature that it belongs to."""
        self.parameter += by.to(self.parameter)

    def step(self, gradient: Float[Tensor, " conditions"], taken: bool) -> None:
        """One step of Adam, where the policy's own was ``taken``."""
        if not taken:
            return
        self.parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def values(self) -> list[float]:
        """One for each condition."""
        return floats(self.parameter)

    def settle(self) -> None:
        """A step is complete: `state_dict` is of now."""
        self._settled = self.parameter.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"value": self._settled, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            self.parameter.copy_(state_dict["value"])
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self.settle()
