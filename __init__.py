"""Tiltune: fine-tune a diffusion sampler so that it draws from p_prior(x) · exp(-E(x)/alpha), and measure how close it came.

The public names below are loaded when they are first used, so that importing the package stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .finetune.certificate import gather_evidence, judge_known, judge_unknown, path_figures
    from .finetune.config import TrainConfig
    from .finetune.energy import Energy, from_density, from_reward
    from .finetune.trainer import Trainer, TrainResult
    from .samplers.chain import Chain
    from .samplers.mlp import MLPDenoiser
    from .samplers.policy import Prior, ResidualDenoiser, trainable_copy
    from .samplers.rollout import noise_back, rollout
    from .samplers.schedulers import brownian_chain, chain_from_scheduler, place_timesteps

_HOMES = {
    "finetune.certificate": ("gather_evidence", "judge_known", "judge_unknown", "path_figures"),
    "finetune.config": ("TrainConfig",),
    "finetune.energy": ("Energy", "from_density", "from_reward"),
    "finetune.trainer": ("TrainResult", "Trainer"),
    "samplers.chain": ("Chain",),
    "samplers.mlp": ("MLPDenoiser",),
    "samplers.policy": ("Prior", "ResidualDenoiser", "trainable_copy"),
    "samplers.rollout": ("noise_back", "rollout"),
    "samplers.schedulers": ("brownian_chain", "chain_from_scheduler", "place_timesteps"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - grouped by what they are for
    "__version__",
    "Trainer",
    "TrainConfig",
    "TrainResult",
    "Energy",
    "from_reward",
    "from_density",
    "Prior",
    "Chain",
    "MLPDenoiser",
    "ResidualDenoiser",
    "trainable_copy",
    "chain_from_scheduler",
    "brownian_chain",
    "place_timesteps",
    "rollout",
    "noise_back",
    "gather_evidence",
    "path_figures",
    "judge_known",
    "judge_unknown",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tiltune' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
