"""Gradients that are left out."""

from __future__ import annotations

import math
import statistics
from typing import Any

MAX_OVERFLOWS = 20  # a scaler starts far too high and needs about that many to come down
NORMS = 20  # gradients that a spike is compared with


class StepGuard:
    """Counts the steps in a row that were left out, and stops a run that only leaves out.

    spike_factor: a gradient of more than so many times the median norm of the last `NORMS` is left out; None for no such rule.
    """

    def __init__(self, max_skipped: int, spike_factor: float | None) -> None:
        self.max_skipped, self.spike_factor = max_skipped, spike_factor
        self._skipped = self._overflows = 0
        self._norms: list[float] = []
        self.settle()

    def admits(self, norm: float) -> bool:
        """Whether a gradient of this norm is finite, and no spike where those are left out.

        Errors: FloatingPointError where too many in a row are not.
        """
        spike = self.spike_factor
        spiked = spike is not None and len(self._norms) == NORMS and norm > spike * statistics.median(self._norms)
        if math.isfinite(norm) and not spiked:
            return True
        self._skipped += 1
        if self._skipped > self.max_skipped:
            raise FloatingPointError(
                f"{self._skipped} steps in a row were left out, the last for a gradient of norm {norm:.3g}; the policy is as"
                " it was before them. Lower the learning rate, or raise max_skipped."
            )
        return False

    def remember(self, norm: float) -> None:
        """A gradient of this norm is used."""
        self._skipped = 0
        self._norms = [*self._norms, norm][-NORMS:]

    def overflowed(self) -> None:
        """A float16 gradient overflowed.

        Errors: FloatingPointError where too many in a row did.
        """
        self._overflows += 1
        if self._overflows > MAX_OVERFLOWS:
            raise FloatingPointError(
                f"the float16 gradient overflowed {self._overflows} times in a row; use bf16 or float32, or lower the"
                " learning rate."
            )

    def fitted(self) -> None:
        """A float16 gradient did not overflow."""
        self._overflows = 0

    def settle(self) -> None:
        """A step is complete: `state_dict` is of now."""
        self._settled = {"skipped": self._skipped, "overflows": self._overflows, "norms": self._norms}

    def state_dict(self) -> dict[str, Any]:
        return self._settled

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._overflows, self._norms = state_dict["skipped"], state_dict["overflows"], state_dict["norms"]
        self.settle()
