"""How much closer to the target than its prior a policy is, and the sentence that says so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

BETTER = 2.0  # standard errors above 0 from which on a policy is said to be closer than its prior


@dataclass(frozen=True)
class Improvement:
    """How much closer to the target than the prior a policy is, in nats of the gap EUBO - ELBO over paths.

    nats, se: prior's gap less the policy's, and its standard error. gap_prior: the prior's own. reached: the phase whose end the
    policy is of; "prior" where nothing that was tried was closer than the prior itself, which the policy then is again. reach:
    the temperature that the held-out paths stand for, over the target's: above 1 where too few prior samples are effective there
    (`temperature_within_reach`). The target's side is then continued from it, as if log h were linear. Energies are those that
    the training sees, cut at ``max_energy``. by_condition: {name: (nats, standard error)}, where there are
    several, of which all else is the mean.
    """

    nats: float
    se: float
    gap_prior: float
    reached: str
    reach: float = 1.0
    by_condition: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    @property
    def sentence(self) -> str:
        """What came of it; of several conditions the mean, and which one came off worst."""
        if not self.by_condition:
            return self._sentence
        name, (nats, se) = min(self.by_condition.items(), key=lambda item: item[1][0])
        worse = "WORSE THAN THE PRIOR" if nats < -BETTER * se else "the least"
        count = len(self.by_condition)
        return f"on average over {count} conditions ({worse}: {name}, {nats:+.2f} ± {se:.2f} nats): {self._sentence}"

    @property
    def _sentence(self) -> str:
        own = f"the prior's own gap to the target is {self.gap_prior:.2f} nats"
        if self.reach > 1:
            own = (
                f"too few prior samples have weight at this alpha, so the target's side was seen at {self.reach:.2g} times alpha"
                f" and continued; so continued, the prior's own gap to the target is {self.gap_prior:.2f} nats"
            )
        if self.reached == "prior" and self.nats == 0:
            return f"NOT BETTER THAN THE PRIOR: nothing that was tried came closer, so the policy is the prior again; {own}."
        if self.reached == "prior":
            return (
                f"NOT BETTER THAN THE PRIOR: the best that was tried has a gap {-self.nats:+.2f} ± {self.se:.2f} nats from the"
                f" prior's, so the policy is the prior again; {own}."
            )
        if self.nats < BETTER * self.se:
            return f"not shown to be better than the prior: {self.nats:+.2f} ± {self.se:.2f} nats; {own}."
        left = self.gap_prior - self.nats
        return f"closer to the target than the prior by {self.nats:.2f} ± {self.se:.2f} nats; {own}, and {left:.2f} are left."

    def to_dict(self) -> dict[str, Any]:
        """As run.json holds it; by condition only where there are several."""
        values = asdict(self)
        if not self.by_condition:
            del values["by_condition"]
        return {**values, "sentence": self.sentence}
