"""Steps in nats: an optimizer's step is shortened until it moves the policy by no more than a bound.

    KL(before || after) = sum_k E ½ |delta_k|²,    delta_k = (mu_after - mu_before) / sigma_k

An Adam step has the size of the learning rate, whatever the gradient is, and a shift of the network's output counts d q / sigma
times in delta. So one rate moves one prior by .01 nats and another one by 3000. The nats are what means the same everywhere. They
are measured on a few states that stay the same for a phase, so that the outputs after one step are those before the next. More
of them lie at the steps where the same change moves more. The direction stays the optimizer's, and so do its moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...samplers.condition import Condition, selected
from ...samplers.denoiser import evaluate_in_parts
from ...samplers.prior import Prior
from ...samplers.shapes import AnyShape, Index, States
from ...samplers.trajectory import Trajectories
from .rows import step_share, stratified

ROWS, EACH = 16, 2  # states that a step is measured on: of all conditions, of each one
AIM = 0.7  # share of the bound that a shortened step aims at, so that the next one, a little longer, is within it too
GROWTH = 1.05  # of the share of the optimizer's step that is tried next
TRIES = 12
FLOOR = 1e-3  # of the bound, below which a schedule does not lower it
SMALL = 0.01  # nats up to which a step is taken that no shortening makes smaller


class StepBound:
    """Shortens steps of ``policy``.

    share: of the optimizer's last step that was taken, where the search for the next one begins.
    state, step, condition, weight: what steps are measured on, and for how many kernels each counts; the state
    is None until `look_at`.
    """

    def __init__(self, prior: Prior, policy: nn.Module, agreed: Callable[[float], float]) -> None:
        self.prior, self.policy, self.agreed = prior, policy, agreed
        self.share = 1.0
        self.state: States | None = None
        self.condition: Condition | None = None
        self.step: Index = torch.empty(0, dtype=torch.long)
        self.weight: Float[Tensor, " n"] = torch.empty(0)
        self._output = torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        group = None if self.condition is None else self.condition.group
        return {"share": self.share, "state": self.state, "step": self.step, "weight": self.weight, "group": group}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.share = state_dict["share"]
        if state_dict["state"] is not None:
            self.state, self.step, self.weight = (state_dict[name].to(self.prior.device) for name in ("state", "step", "weight"))
        if state_dict["group"] is not None:
            assert self.prior.condition_table is not None
            self.condition = Condition(self.prior.condition_table, state_dict["group"].to(self.prior.device))

    @torch.no_grad()
    def look_at(self, trajectories: Trajectories, generator: torch.Generator) -> None:
        """Measure on states of these trajectories from now on, at steps drawn by `step_share`."""
        states, device = trajectories.states, trajectories.states.device
        share = step_share(self.prior.chain).to(device)
        rows = max(ROWS, EACH * self.prior.num_conditions)
        row = stratified(share, rows, generator)
        self.step = self.prior.chain.step_of_row(row)
        self.weight = (1 / (rows * share[row])).double()
        path = torch.randint(states.shape[1], (rows,), generator=generator, device=device)
        self.state, self.condition = states[self.step, path].clone(), selected(trajectories.condition, path)

    @torch.no_grad()
    def begin(self) -> None:
        """The policy as it is now is where the next step starts from."""
        if self.state is not None:
            self._output = self._evaluate()

    def _evaluate(self) -> States:
        assert self.state is not None
        return evaluate_in_parts(self.policy, self.prior.chain, self.state, self.step, self.condition)

    def _nats(self, output: States) -> float:
        """The mean over the processes."""
        assert self.state is not None
        shift = self.prior.chain.kernel.shift(self.state, self.step, output, self._output).double().flatten(1)
        return self.agreed((0.5 * self.weight * shift.square().sum(1)).sum().item())

    @torch.no_grad()
    def shorten(self, before: list[AnyShape], weights: list[AnyShape], limit: float) -> float:
        """Move ``weights`` back toward ``before`` until the step from there is at most ``limit`` nats; returns its nats.

        A step that is above the limit at every length that was tried is not taken: 0 nats. One that leads to no number at any
        length says nothing of the next one's. Nats go with the square of a length. Where they fall by less than the length itself
        did, they are those of rounding in a large network, and a small step is taken as it is.
        """
        full = [weight.clone() for weight in weights]
        share, nats, shortened, longer = self.share, math.inf, 1.0, math.inf
        self.share = min(1.0, self.share * GROWTH)
        for _ in range(TRIES):
            if self.share < 1.0:
                for weight, old, new in zip(weights, before, full, strict=True):
                    weight.copy_(torch.lerp(old, new, self.share))
            output = self._evaluate()
            nats = self._nats(output)
            rounding = shortened < 0.5 and shortened * longer < nats < SMALL
            if rounding:
                self.share /= shortened  # the longer one would have done
            if nats <= limit or rounding:
                self._output = output
                return nats
            shortened, longer = min(0.9, max(0.1, math.sqrt(AIM * limit / nats))) if math.isfinite(nats) else 0.1, nats
            self.share *= shortened
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
        if not math.isfinite(nats):
            self.share = share
        return 0.0
