"""Tiltune: fine-tune a diffusion sampler so that it draws from p_prior(x) · exp(-E(x)/alpha), and measure how close it came.

The public names below are loaded when they are first used, so that importing the package stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .finetune.certificate.criteria import judge_known
    from .finetune.certificate.deployment import deployment_metrics
    from .finetune.certificate.evidence import gather_evidence
    from .finetune.certificate.path_metrics import path_metrics
    from .finetune.certificate.verdict import judge_unknown
    from .finetune.config.certificate import CertificateConfig
    from .finetune.config.energy import EnergyConfig
    from .finetune.config.policy import PolicyConfig
    from .finetune.config.prior import PriorConfig
    from .finetune.config.run import RunConfig, pretrained_recipe
    from .finetune.config.train import TrainConfig
    from .finetune.energies.cache import CachedEnergy
    from .finetune.energies.energy import Energy, from_density, from_reward
    from .finetune.energies.images import to_pil, to_uint8, to_unit
    from .finetune.energies.likelihoods import from_classifier, linear_measurement
    from .finetune.energies.names import load_energy
    from .finetune.energies.weighted_sum import WeightedSum
    from .finetune.energies.workers.pool import EnergyPool
    from .finetune.energies.workers.remote import from_remote
    from .finetune.learning.trainer import Trainer, TrainResult
    from .finetune.runs.evaluate import certify, measure_deployment
    from .finetune.runs.export import export_policy
    from .finetune.runs.run import Run, open_run
    from .finetune.runs.train import train
    from .launch.pictures import run_figure
    from .samplers.bridge import noise_back
    from .samplers.chain import Chain
    from .samplers.denoiser import ResidualDenoiser
    from .samplers.loading.policy import load_policy
    from .samplers.loading.pretrained import load_prior
    from .samplers.make_policy import make_policy, trainable_copy
    from .samplers.mlp import MLPDenoiser
    from .samplers.policy import Policy
    from .samplers.prior import Prior
    from .samplers.resampling import importance_resample
    from .samplers.rollout import rollout
    from .samplers.schedulers.brownian import brownian_chain
    from .samplers.schedulers.dispatch import chain_from_scheduler
    from .samplers.schedulers.placement import place_timesteps
    from .tasks.task import load_task

_HOMES = {
    "finetune.certificate.evidence": ("gather_evidence",),
    "finetune.certificate.path_metrics": ("path_metrics",),
    "finetune.config.certificate": ("CertificateConfig",),
    "finetune.config.energy": ("EnergyConfig",),
    "finetune.config.policy": ("PolicyConfig",),
    "finetune.config.prior": ("PriorConfig",),
    "finetune.config.run": ("RunConfig", "pretrained_recipe"),
    "finetune.config.train": ("TrainConfig",),
    "finetune.certificate.criteria": ("judge_known",),
    "finetune.certificate.deployment": ("deployment_metrics",),
    "finetune.energies.energy": ("Energy", "from_density", "from_reward"),
    "finetune.energies.cache": ("CachedEnergy",),
    "finetune.energies.images": ("to_pil", "to_uint8", "to_unit"),
    "finetune.energies.likelihoods": ("from_classifier", "linear_measurement"),
    "finetune.energies.names": ("load_energy",),
    "finetune.energies.workers.pool": ("EnergyPool",),
    "finetune.energies.workers.remote": ("from_remote",),
    "finetune.energies.weighted_sum": ("WeightedSum",),
    "finetune.runs.evaluate": ("certify", "measure_deployment"),
    "finetune.runs.export": ("export_policy",),
    "finetune.runs.run": ("Run", "open_run"),
    "finetune.runs.train": ("train",),
    "finetune.learning.trainer": ("TrainResult", "Trainer"),
    "finetune.certificate.verdict": ("judge_unknown",),
    "launch.pictures": ("run_figure",),
    "samplers.chain": ("Chain",),
    "samplers.mlp": ("MLPDenoiser",),
    "samplers.denoiser": ("ResidualDenoiser",),
    "samplers.prior": ("Prior",),
    "samplers.policy": ("Policy",),
    "samplers.make_policy": ("make_policy", "trainable_copy"),
    "samplers.loading.pretrained": ("load_prior",),
    "samplers.loading.policy": ("load_policy",),
    "samplers.bridge": ("noise_back",),
    "samplers.rollout": ("rollout",),
    "samplers.schedulers.brownian": ("brownian_chain",),
    "samplers.schedulers.dispatch": ("chain_from_scheduler",),
    "samplers.schedulers.placement": ("place_timesteps",),
    "samplers.resampling": ("importance_resample",),
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
    "load_prior",
    "Policy",
    "make_policy",
    "load_policy",
    "trainable_copy",
    "ResidualDenoiser",
    "MLPDenoiser",
    "importance_resample",
    "export_policy",
    "deployment_metrics",
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
    "path_metrics",
    "judge_known",
    "judge_unknown",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tiltune' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
