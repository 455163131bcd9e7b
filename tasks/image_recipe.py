"""What the tasks on real images share: how they train, and the chain on a shipped prior."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..finetune.certificate.criteria import Criterion
from ..finetune.config.certificate import CertificateConfig
from ..finetune.config.energy import EnergyConfig
from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig
from ..finetune.config.train import TrainConfig

if TYPE_CHECKING:
    from ..samplers.prior import Prior


def image_recipe(task: str, energy: str, alpha: float, updates: int, certificate_size: int) -> RunConfig:
    """REINFORCE-KL with the forward KL beside it, after a warm start, at K = 20."""
    train = TrainConfig(
        alpha=alpha,
        objective="reinforce_kl",
        soft_value_updates=300,
        population_size=8000,
        warm_start_updates=200,
        warm_start_rows=256,
        warm_start_learning_rate=5e-4,
        updates=updates,
        batch_size=128,
        forward_rows=256,
        learning_rate=4e-4,
        tempering_ess=None,
        ema_decay=0.99,
        max_grad_norm=30.0,
        memory_mb=256.0,
        monitor_every=1000,
    )
    return RunConfig(
        task=task,
        prior=PriorConfig(steps=20),
        energy=EnergyConfig((energy,)),
        train=train,
        certificate=CertificateConfig(size=certificate_size),
        threads=2,
    )


def path_criteria(metrics: dict[str, Any]) -> list[Criterion]:
    """The lines of paths: how far apart the bounds of log Z are, and its estimates from both sides."""
    return [
        Criterion("EUBO - ELBO", metrics["gap"], 2.0),
        Criterion("|log Z forward - reverse|", abs(metrics["log_z"] - metrics["log_z_forward"]), 0.3),
    ]


def class_criteria(metrics: dict[str, Any]) -> list[Criterion]:
    """The lines of an energy of one set of classes, unmeasured where the certificate found no such energy."""
    found = "share" in metrics
    return [
        Criterion("share below the target's", metrics["share_reference"] - metrics["share"] if found else None, 0.03),
        Criterion("|diversity ratio - 1|", abs(metrics["diversity"] - 1) if found else None, 0.1),
    ]


def shipped_prior(folder: Path, config: PriorConfig) -> Prior:
    """The pipeline in ``folder`` with the config's chain.

    Errors: ValueError for a chain by name: the pipeline's scheduler is the only one.
    """
    from ..finetune.runs.build import pretrained_prior

    if config.dim is not None or config.seed:
        raise ValueError("this task has one prior, of images of one size; leave out dim and the prior's seed.")
    if config.chain is not None:
        raise ValueError(f"this task has one chain, its pipeline's scheduler; leave out the chain {config.chain!r}.")
    return pretrained_prior(config, folder)
