"""The objectives by name, and what each asks of its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from ..config.train import CLIP, TrainConfig
from .batch import Batch
from .clipped import CLIPPED, ppo_kl
from .comparators import COMPARATORS, ddpo, grpo
from .objectives import log_variance, reinforce_kl, rtb, tlm, trust_pcl
from .path_consistency import OF_PARTS


class Objective(NamedTuple):
    """An objective and what it asks of its surroundings."""

    loss: Callable[[Batch, float, Float[Tensor, ""], float | None], Float[Tensor, ""]]
    learns_log_z: bool = False
    takes_soft_value: bool = False
    learns_soft_value: bool = False
    targets_tilted_law: bool = True
    # On-policy its gradient is alpha^alpha_power times that of the KL to the tilted law, in nats.
    alpha_power: int = 0
    # Behaviors whose trajectories it is right on; anything else is refused before the first update.
    behaviors: frozenset[str] = frozenset({"on_policy", "prior", "inflated", "tilted_prior", "noised_back", "replay"})


ON_POLICY = frozenset({"on_policy"})
OBJECTIVES: dict[str, Objective] = {
    "rtb": Objective(rtb, learns_log_z=True),
    "log_variance": Objective(log_variance),
    "trust_pcl": Objective(trust_pcl, learns_log_z=True, alpha_power=2),
    "reinforce_kl": Objective(
        reinforce_kl,
        takes_soft_value=True,
        alpha_power=1,
        behaviors=frozenset({"on_policy", "prior", "inflated", "tilted_prior", "replay"}),
    ),
    "ppo_kl": Objective(partial(ppo_kl, clip=CLIP), takes_soft_value=True, alpha_power=1, behaviors=ON_POLICY),
    "tlm": Objective(tlm, behaviors=frozenset({"tilted_prior", "noised_back"})),
    "ddpo": Objective(partial(ddpo, clip=CLIP), behaviors=ON_POLICY, targets_tilted_law=False),
    "grpo": Objective(partial(grpo, clip=CLIP), behaviors=ON_POLICY, targets_tilted_law=False),
}


def objective_of(config: TrainConfig) -> Objective:
    """The config's objective: on parts of a path where it has a horizon, and clipped where it has a clip."""
    whole = OBJECTIVES[config.objective]
    if config.horizon is not None:
        loss = partial(OF_PARTS[config.objective], horizon=config.horizon)
        return whole._replace(loss=loss, learns_soft_value=True, learns_log_z=False)
    if config.clip is not None:
        return whole._replace(loss=partial((CLIPPED | COMPARATORS)[config.objective], clip=config.clip))
    return whole
