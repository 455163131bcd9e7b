"""How the policy's weights move: Adam in steps of a bounded size, one schedule and one running average a phase."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...samplers.policy import Policy
from ...samplers.shapes import AnyShape
from ..config.train import TrainConfig
from ..distributed.processes import Processes
from .step_bound import FLOOR, StepBound
from .step_guard import StepGuard


class Optimization:
    """Moves the weights of ``wrapped``, which is ``policy`` as it is called (`Processes.wrap`).

    scaler: of gradients in float16, which would round small ones to zero. torn: whether a step has begun that is not complete.
    """

    def __init__(
        self, policy: Policy, wrapped: nn.Module, config: TrainConfig, processes: Processes, bound: StepBound, guard: StepGuard
    ) -> None:
        self._policy, self._wrapped, self.config, self.processes = policy, wrapped, config, processes
        self.bound, self.guard = bound, guard
        half = getattr(policy.prior.denoiser, "autocast", None) == torch.float16
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=half)
        self._average: list[Tensor] | None = None
        self.torn = self._restored = False
        self._create(config.learning_rate, 1)

    def _create(self, learning_rate: float, steps: int) -> None:
        weights = [weight for weight in self._wrapped.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.Adam(weights, learning_rate)
        # OneCycleLR divides by zero where its rise has a single step (10 steps at 10%).
        total = max(4, steps)
        rise = max(0.1, 2 / total)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, learning_rate, total_steps=total, pct_start=rise)
        self._peak = learning_rate

    # --- a phase -----------------------------------------------------------------------------------------------------

    def begin(self, learning_rate: float, steps: int) -> None:
        """A phase of so many steps begins, or goes on where `load_state_dict` found it."""
        self._peak = learning_rate
        if self._restored:
            self._restored = False
            return
        self._create(learning_rate, steps)
        self._average = [weight.clone() for weight in self.weights] if self.config.ema_decay else None

    def end(self) -> None:
        """The phase ends: the policy takes the average of its weights, where there is one."""
        if self._average is not None:
            self.set_weights(self._average)
            self._average = None

    def step(self, bound: float) -> float | None:
        """Move the policy by the gradient that is there, by at most ``bound`` nats at the schedule's peak; returns the nats.

        None where the step is left out, and only the gradient is dropped.

        Errors: FloatingPointError where too many steps in a row are left out.
        """
        self.scaler.unscale_(self._optimizer)
        clipped = torch.nn.utils.clip_grad_norm_(self._wrapped.parameters(), self.config.max_grad_norm)
        norm = self.processes.full_tensor(clipped).item()
        # An enabled scaler leaves out a step that overflowed by itself, and lowers its scale.
        if not self.scaler.is_enabled() and not self.guard.admits(norm):
            self._optimizer.zero_grad()
            return None
        self.guard.remember(norm)
        self.torn = True
        scale, before = self.scaler.get_scale(), [weight.clone() for weight in self.weights]
        limit = bound * max(FLOOR, (float(self._schedule.get_last_lr()[0]) / self._peak) ** 2)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad()
        if self.scaler.get_scale() < scale:
            self.guard.overflowed()
            return None
        self.guard.fitted()
        nats = self.bound.shorten(before, self.weights, limit)
        self._schedule.step()
        if self._average is not None:
            # Slow averages of a short run would hold its start: the decay grows with the steps taken.
            taken = self._schedule.last_epoch
            decay = min(self.config.ema_decay, taken / (taken + 9))
            lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            lerp_(self._average, self.weights, 1 - decay)
        return nats

    # --- the weights -------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> list[AnyShape]:
        """What is trained, as this process holds it, without a graph."""
        return [weight.detach() for weight in self._wrapped.parameters() if weight.requires_grad]

    def set_weights(self, weights: list[AnyShape]) -> None:
        for own, weight in zip(self.weights, weights, strict=True):
            own.copy_(weight)

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """The policy as it would be if the phase ended here: with the average of its weights, where there is one."""
        if self._average is None:
            yield
            return
        weights = [weight.clone() for weight in self.weights]
        self.set_weights(self._average)
        try:
            yield
        finally:
            self.set_weights(weights)

    def _named(self) -> dict[str, AnyShape]:
        pairs = zip(self._policy.named_parameters(), self._wrapped.parameters(), strict=True)
        return {name: weight for (name, _), weight in pairs if weight.requires_grad}

    # --- its state ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """A step is complete."""
        self.torn = False

    def state_dict(self) -> dict[str, Any]:
        """Full tensors, on the process that writes; called by all."""
        saved = self.processes.saved
        optimizer = self._optimizer.state_dict()
        moments = {index: {name: saved(value) for name, value in own.items()} for index, own in optimizer["state"].items()}
        return {
            "weights": {name: saved(weight) for name, weight in self._named().items()},
            "average": None if self._average is None else [saved(average) for average in self._average],
            "optimizer": {**optimizer, "state": moments},
            "schedule": self._schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Errors: ValueError for the state of a policy that trains other weights."""
        named, shard = self._named(), self.processes.shard
        if named.keys() != state_dict["weights"].keys():
            raise ValueError("the checkpoint is of another policy: it trains other weights. Resume with the config of the run.")
        with torch.no_grad():
            for name, weight in state_dict["weights"].items():
                named[name].copy_(shard(weight, named[name]))
        weights = self.weights
        states: dict[int, dict[str, Any]] = state_dict["optimizer"]["state"]
        moments = {
            index: {name: value if name == "step" else shard(value, weights[index]) for name, value in own.items()}
            for index, own in states.items()
        }
        self._optimizer.load_state_dict({**state_dict["optimizer"], "state": moments})
        self._schedule.load_state_dict(state_dict["schedule"])
        self.scaler.load_state_dict(state_dict["scaler"])
        saved = state_dict["average"]
        self._average = None if saved is None else [shard(one, like) for one, like in zip(saved, weights, strict=True)]
        self._restored = True
