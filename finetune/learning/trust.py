"""How far an update may go, by what the rows of the updates before it show.

A regression on targets t of a policy's shift delta explains, on rows that no update has seen yet,

    e = sum_k E [½ |t|² - ½ |delta - t|²]        nats; 0 at the prior

The noise of the targets moves the whole network by each update, and a narrow kernel, which has next to nothing to learn, is moved
by the most nats. Updates that are long beside what there is to learn lose more there than they win elsewhere, and e falls below
what it was. While e grows they are not too long. No network is evaluated for this.
"""

from __future__ import annotations

import math
from typing import Any

RECENT = 0.9  # decay of the average of e
ERRORS = 2.0  # standard errors of that average by which it must be below its best
SHRUNK, GROWN = 0.9, 1.05  # the share after such an update, and after any other
LEAST, MOST = 0.01, 1.0  # bounds of the share: what is learned to the end still has to be cleaned of the noise of longer updates


class Trust:
    """share: of the nats that the targets ask for, sum_k E ½ |t|², by which an update may move the policy."""

    def __init__(self) -> None:
        self.share = 1.0
        self._asked = self._seen = self._variance = self._best = 0.0
        self._mean: float | None = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def renew(self) -> None:
        """The targets are others from now on: what was explained of the old ones is no measure for these."""
        self._mean, self._variance, self._best = None, 0.0, -math.inf

    def observe(self, asked: float, missed: float) -> None:
        """The sums over an update's rows of ½ |t|² and ½ |delta - t|², weighed as in its loss. What is no number says nothing:
        such an update is left out."""
        if not math.isfinite(asked - missed):
            return
        self._asked, self._seen = self._asked + asked, self._seen + 1
        explained = asked - missed
        before = explained if self._mean is None else self._mean
        away = explained - before
        self._mean = before + (1 - RECENT) * away
        self._variance = RECENT * self._variance + (1 - RECENT) * away**2
        self._best = max(self._best, self._mean)
        error = math.sqrt(self._variance * (1 - RECENT) / (1 + RECENT))
        fell = self._mean < self._best - ERRORS * error
        self.share = max(LEAST, self.share * SHRUNK) if fell else min(MOST, self.share * GROWN)

    @property
    def nats(self) -> float:
        """By which the next update may move the policy."""
        return self.share * self._asked / max(1.0, self._seen)
