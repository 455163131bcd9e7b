"""The config of a whole run, and the one for a prior about which nothing is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .certificate import CertificateConfig
from .energy import EnergyConfig
from .policy import PolicyConfig
from .prior import PriorConfig
from .refusals import refuse, refuse_other_choices
from .train import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is made of; `yaml_file` reads and writes it as YAML.

    Errors: ValueError for a value no run can have, before any work is done.
    """

    task: str | None = None
    """A shipped task, which brings its prior, energies and truth. None: prior.source says what to train."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    certificate: CertificateConfig = field(default_factory=CertificateConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes an accelerator where there is one."""
    threads: int = 1
    """CPU threads of torch. More pay for images, where no other work shares the cores: the shipped image tasks set 2."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Where the numbers of metrics.jsonl are sent besides; without it where it fails. Needs its package."""

    def __post_init__(self) -> None:
        refuse_other_choices(self)
        refuse(self.threads < 1, f"threads is {self.threads}; at least one is needed.")
        refuse(
            self.task is not None and self.prior.source is not None,
            f"the task {self.task!r} brings its own prior, but {self.prior.source!r} is named too; leave out one of them.",
        )


def pretrained_recipe(source: str | None = None, *terms: str) -> RunConfig:
    """A run on a pretrained sampler about which nothing is known: the default of ``tiltune train --prior``.

    The parts of the shipped image tasks in sizes that an unknown network can afford. The population holds ``population_size`` ·
    (K + 1) states, 1.2 GB for 3 x 32 x 32 at K = 50.
    """
    train = TrainConfig(
        objective="reinforce_kl",
        soft_value_updates=1000,
        population_size=4000,
        warm_start="value_drift",
        warm_start_updates=250,
        warm_start_rows=96,
        warm_start_learning_rate=1e-3,
        warm_start_step_nats=2.0,
        updates=0,
        batch_size=64,
        learning_rate=3e-4,
        step_nats=0.01,
        tempering_ess=None,
        ema_decay=0.98,
        memory_mb=256.0,
    )
    return RunConfig(prior=PriorConfig(source), energy=EnergyConfig(terms), train=train)
