"""What run.json holds: how a training ended, and what the run was made of."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ..config.run import RunConfig
from ..distributed.signals import Preempted

if TYPE_CHECKING:
    from ...samplers.policy import Policy
    from ..learning.trainer import Trainer, TrainResult


@dataclass(frozen=True, eq=False)
class Ending:
    """How a training ended: with a ``result``, or with what stopped it, after at least one line of metrics.

    result: also of a training that was interrupted in good order. new_steps: without those of the checkpoint that it went on
    from.
    """

    result: TrainResult | None
    stopped: Exception | KeyboardInterrupt | None
    new_steps: int

    @property
    def interrupted(self) -> bool:
        return isinstance(self.stopped, KeyboardInterrupt) or (self.result is not None and self.result.interrupted)

    @property
    def preempted(self) -> bool:
        return isinstance(self.stopped, Preempted) or (self.result is not None and self.result.preempted)


def record_of(
    config: RunConfig,
    trainer: Trainer,
    policy: Policy,
    ending: Ending,
    *,
    named: bool,
    conditions: dict[str, str],
    checkpoint_seconds: float,
) -> dict[str, Any]:
    """The content of run.json.

    named: whether the config's terms name the energy, or a function was given. conditions: of the chain. checkpoint_seconds:
    of the longest save, for whoever has so many before SIGKILL.
    """
    from ..learning.drift import over_budget

    result, stopped, prior = ending.result, ending.stopped, trainer.state.prior
    taken = sum(line["phase"] == config.train.objective for line in trainer.history)
    alone = trainer.state.processes.count == 1
    return {
        "interrupted": ending.interrupted,
        "preempted": ending.preempted,
        "stopped": f"{type(stopped).__name__}: {stopped}" if isinstance(stopped, Exception) else None,
        "over_budget": over_budget(trainer.history[-1], config.train.max_kl) if taken < config.train.updates else None,
        "new_steps": ending.new_steps,
        "updates": taken,
        "energy_calls": trainer.state.energies.meter.calls if alone else trainer.history[-1]["energy_calls"],
        "population_ess": trainer.state.preparation.effective,
        "log_z": None if result is None or len(result.log_z_by_condition) > 1 else result.log_z,
        "log_z_by_condition": {} if result is None else result.log_z_by_condition,
        "improvement": None if result is None or result.improvement is None else result.improvement.to_dict(),
        "seconds": None if result is None else round(result.seconds, 1),
        "checkpoint_seconds": round(checkpoint_seconds, 3),
        "energy": list(config.energy.terms) if named else None,
        "decisions": list(prior.decisions),
        "conditions": conditions,
        "trained_parameters": sum(weight.numel() for weight in policy.parameters() if weight.requires_grad),
        "device": str(prior.device),
        "versions": {
            "tiltune": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "accelerate")},
        },
    }
