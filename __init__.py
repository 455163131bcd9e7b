"""Tiltune: fine-tune a diffusion sampler so that it draws from p_prior(x) · exp(-E(x)/alpha), and measure how close it came.

The public names below are loaded when they are first used, so that importing the package stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .finetune.certificate import gather_evidence, path_figures
    from .finetune.config import (
        CertificateConfig,
        EnergyConfig,
        PolicyConfig,
        PriorConfig,
        RunConfig,
        TrainConfig,
        pretrained_recipe,
    )
    from .finetune.criteria import judge_known
    from .finetune.deployment import deployment_figures
    from .finetune.energy import Energy, from_density, from_reward
    from .finetune.energy_cache import CachedEnergy
    from .finetune.energy_images import to_pil, to_uint8, to_unit
    from .finetune.energy_likelihoods import from_classifier, linear_measurement
    from .finetune.energy_loading import load_energy
    from .finetune.energy_pool import EnergyPool
    from .finetune.energy_remote import from_remote
    from .finetune.energy_sum import WeightedSum
    from .finetune.evaluation import certify, measure_deployment
    from .finetune.export import export_policy
    from .finetune.run import Run, open_run, train
    from .finetune.trainer import Trainer, TrainResult
    from .finetune.verdict import judge_unknown
    from .launch.pictures import run_figure
    from .samplers.chain import Chain
    from .samplers.mlp import MLPDenoiser
    from .samplers.policy import Policy, Prior, ResidualDenoiser, make_policy, trainable_copy
    from .samplers.pretrained import load_policy
    from .samplers.rollout import noise_back, rollout
    from .samplers.schedulers import brownian_chain, chain_from_scheduler, place_timesteps
    from .samplers.steering import importance_resample
    from .tasks.task import load_task

_HOMES = {
    "finetune.certificate": ("gather_evidence", "path_figures"),
    "finetune.config": (
        "CertificateConfig",
        "EnergyConfig",
        "PolicyConfig",
        "PriorConfig",
        "RunConfig",
        "TrainConfig",
        "pretrained_recipe",
    ),
    "finetune.criteria": ("judge_known",),
    "finetune.deployment": ("deployment_figures",),
    "finetune.energy": ("Energy", "from_density", "from_reward"),
    "finetune.energy_cache": ("CachedEnergy",),
    "finetune.energy_images": ("to_pil", "to_uint8", "to_unit"),
    "finetune.energy_likelihoods": ("from_classifier", "linear_measurement"),
    "finetune.energy_loading": ("load_energy",),
    "finetune.energy_pool": ("EnergyPool",),
    "finetune.energy_remote": ("from_remote",),
    "finetune.energy_sum": ("WeightedSum",),
    "finetune.evaluation": ("certify", "measure_deployment"),
    "finetune.export": ("export_policy",),
    "finetune.run": ("Run", "open_run", "train"),
    "finetune.trainer": ("TrainResult", "Trainer"),
    "finetune.verdict": ("judge_unknown",),
    "launch.pictures": ("run_figure",),
    "samplers.chain": ("Chain",),
    "samplers.mlp": ("MLPDenoiser",),
    "samplers.policy": ("Policy", "Prior", "ResidualDenoiser", "make_policy", "trainable_copy"),
    "samplers.pretrained": ("load_policy",),
    "samplers.rollout": ("noise_back", "rollout"),
    "samplers.schedulers": ("brownian_chain", "chain_from_scheduler", "place_timesteps"),
    "samplers.steering": ("importance_resample",),
    "tasks.task": ("load_task",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - grouped by what they are for
    "__version__",
    # a run as a folder
    "train",
    "open_run",
    "certify",
    "measure_deployment",
    "Run",
    "RunConfig",
    "PriorConfig",
    "EnergyConfig",
    "PolicyConfig",
    "TrainConfig",
    "CertificateConfig",
    "pretrained_recipe",
    "load_task",
    "run_figure",
    # its parts
    "Trainer",
    "TrainResult",
    "Prior",
    "Policy",
    "make_policy",
    "load_policy",
    "trainable_copy",
    "ResidualDenoiser",
    "MLPDenoiser",
    "importance_resample",
    "export_policy",
    "deployment_figures",
    # energies
    "Energy",
    "load_energy",
    "from_reward",
    "from_density",
    "from_classifier",
    "linear_measurement",
    "from_remote",
    "WeightedSum",
    "CachedEnergy",
    "EnergyPool",
    "to_unit",
    "to_uint8",
    "to_pil",
    # chains and trajectories
    "Chain",
    "chain_from_scheduler",
    "brownian_chain",
    "place_timesteps",
    "rollout",
    "noise_back",
    # the certificate
    "gather_evidence",
    "path_figures",
    "judge_known",
    "judge_unknown",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tiltune' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
