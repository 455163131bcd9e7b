"""How far the policy has moved from its prior, condition by condition: what an update's own rollouts say."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...samplers.shapes import Index
from ..distributed.processes import Processes
from ..estimators import even, mean, pairwise_distance
from ..populations.population import Population

STANDARD_ERRORS = 2.6  # of the KL, by which it must be above a budget
MOST = 256  # prior samples of a condition whose distances are taken


class Drift:
    """Per condition, "kl_to_prior": the mean of Λ over the policy's own rollouts, KL(policy || prior) over paths, nats, with its
    standard error; and "diversity": the mean distance between two of its terminal states, over that between two of the prior's
    (NaN without a population). It has no state: the prior's distances are those of its paths in the population.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._prior: list[float] | None = None

    def __call__(
        self,
        terminal: Float[Tensor, " batch *state"],
        log_ratio: Float[Tensor, " batch"],
        own: list[Index],
        population: Population | None,
    ) -> list[dict[str, float]]:
        """One entry for each condition; own: of each condition the trajectories that the policy of now drew."""
        if self._prior is None and population is not None:
            paths = population.prior_paths
            self._prior = [self._distance(paths.terminal[index[:MOST]]) for index in paths.groups]
        figures: list[dict[str, float]] = []
        for row, index in enumerate(own):
            spread = self._distance(terminal[index]) / self._prior[row] if self._prior else math.nan
            kl, error = mean(self._processes.gather(log_ratio[index]))
            figures.append({"kl_to_prior": kl, "kl_to_prior_se": error, "diversity": spread})
        return figures

    def _distance(self, x: Float[Tensor, " n *state"]) -> float:
        return self._processes.mean(pairwise_distance(x, even(len(x)).to(x.device))[0])


def over_budget(line: dict[str, Any], max_kl: float | None) -> str | None:
    """Why no further update is taken: whose KL is above the budget for certain by the last line of metrics, or None."""
    if max_kl is None or "kl_to_prior" not in line:
        return None
    for name, found in (line.get("conditions") or {"": line}).items():
        kl, error = found["kl_to_prior"], found["kl_to_prior_se"]
        if kl - STANDARD_ERRORS * error > max_kl:
            of = f" of {name!r}" if name else ""
            return f"KL(policy || prior){of} is {kl:.2f} ± {error:.2f} nats, above max_kl {max_kl:g}"
    return None
