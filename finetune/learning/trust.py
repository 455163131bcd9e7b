"""How far an update may go, by what the rows of the updates before it show.

A regression on targets t of a policy's shift delta explains, on rows that no update has seen yet,

    e = sum_k E [½ |t|² - ½ |delta - t|²]        nats; 0 at the prior

The noise of an update moves the whole network, and a narrow kernel, which has next to nothing to learn, is moved by the most
nats. Long updates pay while e rises: what the targets ask for is far away. Once e rises no longer, they only keep that noise
alive. No network is evaluated for this.
"""

from __future__ import annotations

import math
from typing import Any

RECENT, EARLIER = 0.9, 0.97  # decays of the two averages of e that are compared
ERRORS = 1.0  # standard errors of the first by which it must be above the second
SHRUNK = 0.95  # the share after an update for which it is not
LEAST = 0.01  # of the share


class Trust:
    """share: of the nats that the targets ask for, sum_k E ½ |t|², by which an update may move the policy."""

    def __init__(self) -> None:
        self.share = 1.0
        self._asked = self._seen = self._variance = self._earlier = 0.0
        self._recent: float | None = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def rescale(self, factor: float) -> None:
        """The targets are ``factor`` times what they were: the policy has that far to go, and what was explained of the old ones
        is no measure for the new ones."""
        self._recent, self._variance = None, 0.0
        self.share = max(self.share, min(1.0, abs(1.0 - factor)))

    def observe(self, asked: float, missed: float) -> None:
        """The sums over an update's rows of ½ |t|² and ½ |delta - t|², weighed as in its loss. What is no number says nothing:
        such an update is left out."""
        if not math.isfinite(asked - missed):
            return
        self._asked, self._seen = self._asked + asked, self._seen + 1
        explained = asked - missed
        if self._recent is None:
            self._recent = self._earlier = explained
        away = explained - self._recent
        self._recent += (1 - RECENT) * away
        self._earlier += (1 - EARLIER) * (explained - self._earlier)
        self._variance = RECENT * self._variance + (1 - RECENT) * away**2
        error = math.sqrt(self._variance * (1 - RECENT) / (1 + RECENT))
        if not self._recent - self._earlier > ERRORS * error:
            self.share = max(LEAST, self.share * SHRUNK)

    @property
    def nats(self) -> float:
        """By which the next update may move the policy."""
        return self.share * self._asked / max(1.0, self._seen)
