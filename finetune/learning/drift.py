"""How far the policy has moved from its prior, condition by condition: what an update's own rollouts say."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.shapes import Index
from ..distributed.processes import Processes
from ..populations.population import Population

MOST = 256  # prior samples of a condition whose distances are taken


class Drift:
    """Per condition, "kl_to_prior": the mean of Λ over the policy's own rollouts, KL(policy || prior) over paths, nats; and
    "diversity": the mean distance between two of its terminal states, over that between two of the prior's (NaN without a
    population). It has no state: the prior's distances are those of its paths in the population.
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
            figures.append({"kl_to_prior": self._processes.mean(log_ratio[index].mean().item()), "diversity": spread})
        return figures

    def _distance(self, x: Float[Tensor, " n *state"]) -> float:
        flat = x.flatten(1)
        pairs = len(flat) * (len(flat) - 1)
        return self._processes.mean((torch.cdist(flat, flat).sum() / max(pairs, 1)).item())


def over_budget(line: dict[str, Any], max_kl: float | None) -> str | None:
    """Why no further update is taken: whose KL the last line of metrics has above the budget; None where it is kept."""
    if max_kl is None:
        return None
    each = {name: found["kl_to_prior"] for name, found in line.get("conditions", {}).items()} or {
        "": line.get("kl_to_prior", 0.0)
    }
    worst = max(each, key=lambda name: each[name])
    if not each[worst] > max_kl:
        return None
    of = f" of {worst!r}" if worst else ""
    return f"KL(policy || prior){of} is {each[worst]:.2f} nats, above max_kl {max_kl:g}"
