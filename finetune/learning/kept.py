"""The best weights of a run so far."""

from __future__ import annotations

from typing import Any

from ...samplers.shapes import AnyShape

ALIKE = 0.05  # nats by which two policies that are judged by the same noise are not told apart


class Kept:
    """The weights that came closest to the target so far.

    nats: by how much the best that was offered is closer than the prior. weights: the last that were not told apart from it.
    falls: offers in a row that lay clearly below it.
    """

    def __init__(self, weights: list[AnyShape]) -> None:
        self.weights, self.nats, self.falls = [weight.clone() for weight in weights], 0.0, 0

    def offer(self, nats: float, weights: list[AnyShape], *, slack: float = 0.0, alike: float = 0.0) -> bool:
        """Whether ``weights`` are kept: those that are closer than the prior, and closer than the best or less close by less than
        ``alike``. ``slack``: nats that an offer may lie below without counting as a fall."""
        if nats > max(0.0, self.nats - alike):
            self.nats, self.falls = max(self.nats, nats), 0
            for own, weight in zip(self.weights, weights, strict=True):
                own.copy_(weight)
            return True
        self.falls = self.falls + 1 if not nats >= self.nats - slack else 0
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "nats": self.nats, "falls": self.falls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.nats, self.falls = state_dict["nats"], state_dict["falls"]
        for own, weight in zip(self.weights, state_dict["weights"], strict=True):
            own.copy_(weight)
