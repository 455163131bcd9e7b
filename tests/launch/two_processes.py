"""Run by torchrun in two processes: what happens between them, one scenario after the other, as JSON.

Started by test_processes.py as `python -m torch.distributed.run … two_processes.py OUT`.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from tiltune.finetune import interrupts
from tiltune.finetune.config import TrainConfig
from tiltune.finetune.energy import EnergyError
from tiltune.finetune.gradients import backward_trajectories, objective_gradient
from tiltune.finetune.interrupts import Preempted
from tiltune.finetune.objectives import OBJECTIVES, Batch
from tiltune.finetune.processes import ProcessError, Processes
from tiltune.finetune.trainer import Trainer
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy, ResidualDenoiser
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers import chain_from_scheduler
from tiltune.tasks.linear_gaussian import LinearGaussian

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    objective="reinforce_kl",
    soft_value_updates=2,
    forward_rows=8,
    bank_size=40,
    warm_start_updates=4,
    warm_start_rows=16,
    updates=4,
    batch_size=8,
    monitor_every=2,
    ema_decay=0.9,
    checkpoint_every=1,
)


def make_task() -> LinearGaussian:
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, variance_type="fixed_large"
    )
    slope = torch.tensor([1.0, -0.5], dtype=torch.float64)
    return LinearGaussian(chain_from_scheduler(scheduler, 5), torch.zeros(2, dtype=torch.float64), slope)


TASK = make_task()


def policy() -> ResidualDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLPDenoiser(width=8, depth=1, fourier_features=2)
        torch.nn.init.normal_(network.outward.weight, std=0.3)
    return ResidualDenoiser(TASK.prior().denoiser, network)


def trainer(config: TrainConfig = CONFIG, energy: Any = None, **options: Any) -> Trainer:
    return Trainer(TASK.prior(), energy or TASK.energy, config, policy=policy(), progress=False, **options)


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in module.parameters() if weight.requires_grad]


def gradients(rank: int) -> dict[str, float]:
    """Eight trajectories in one process, and four in each of two with chunks of their own: the largest difference."""
    found = {}
    prior = TASK.prior()
    processes = Processes(CPU)
    for name, objective in OBJECTIVES.items():
        single = Policy(prior, policy(), "residual")
        drawn = rollout(prior, single, 8, torch.Generator().manual_seed(3))
        drawn = drawn.with_(energy=TASK.energy(drawn.terminal))
        assert drawn.energy is not None

        def batch(part: Any, of: Any) -> Batch:
            ratio = step_log_ratio(prior.chain, prior.denoiser, of, part).detach()
            return Batch(ratio, part.energy, torch.ones(len(part), dtype=torch.bool), ratio.sum(0))

        log_z = torch.tensor(0.2, requires_grad=True)
        loss, g = objective_gradient(objective, batch(drawn, single), 0.7, log_z)
        backward_trajectories(single, prior.chain, drawn, g, 100)
        wrapped = processes.wrap(Policy(prior, policy(), "residual"))
        part = drawn.select(torch.arange(4) + 4 * rank)
        own = torch.tensor(0.2, requires_grad=True)
        with torch.no_grad():
            mine = batch(part, wrapped)
        theirs, g = objective_gradient(objective, mine, 0.7, own, gather=processes.gather, rank=rank, world_size=processes.count)
        backward_trajectories(wrapped, prior.chain, part, g, 7, held=lambda wrapped=wrapped: processes.hold(wrapped))
        pairs = [(a.grad, b.grad) for a, b in zip(single.parameters(), wrapped.parameters(), strict=True) if a.requires_grad]
        worst = max((a - b).abs().max().item() for a, b in pairs)  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
        largest = max(a.abs().max().item() for a, _ in pairs)  # pyright: ignore[reportOptionalMemberAccess]
        if log_z.grad is not None and own.grad is not None:
            worst = max(worst, (log_z.grad - own.grad).abs().item())
        found[name] = max(worst / largest, abs(loss.item() - theirs.item()) / max(1.0, abs(loss.item())))
        # The control: without the last, shared pass the gradient is this process's own.
        wrapped.zero_grad()
        with processes.hold(wrapped):
            backward_trajectories(wrapped, prior.chain, part, g, 100)
        alone = [b.grad for b in wrapped.parameters() if b.requires_grad]
        found[f"{name}, not shared"] = (
            max(
                (a - b).abs().max().item()
                for (a, _), b in zip(pairs, alone, strict=True)  # pyright: ignore[reportOptionalOperand]
            )
            / largest
        )
    return found


def caught(kind: type[BaseException], call: Any) -> str:
    try:
        call()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def same_noise(rank: int) -> list[str]:
    processes = Processes(CPU)
    same = caught(ProcessError, lambda: processes.refuse_same_noise(torch.Generator().manual_seed(0)))
    other = caught(ProcessError, lambda: processes.refuse_same_noise(torch.Generator().manual_seed(rank)))
    return [same, other]


def diverged(rank: int) -> list[str]:
    processes = Processes(CPU)
    here = [torch.ones(3), torch.ones(2)]
    same = caught(ProcessError, lambda: processes.refuse_other_weights(here))
    here[1] = here[1] + 1e-3 * rank
    return [caught(ProcessError, lambda: processes.refuse_other_weights(here)), same]


def failing(kind: str, rank: int) -> dict[str, Any]:
    """The energy of process 1 breaks in its sixth call: what each process raises, and whether a checkpoint was asked for."""
    calls, kept = [], []

    def energy(x: Tensor) -> Tensor:
        calls.append(len(x))
        if rank == 1 and len(calls) >= 6:
            if kind == "exception":
                raise RuntimeError("the scorer is gone")
            if kind == "shape":
                return torch.zeros(len(x), 2)
            return torch.full((len(x),), {"nan": float("nan"), "inf": float("inf")}[kind])
        return TASK.energy(x)

    made = trainer(energy=energy, on_checkpoint=lambda trainer: kept.append(trainer.taken))
    raised = caught((EnergyError, ProcessError, ValueError), made.train)  # type: ignore[arg-type]
    return {"raised": raised, "steps": made.taken, "kept": kept[-1] if kept else None}


def stopping(rank: int) -> dict[str, Any]:
    """Process 1 alone is asked to stop, in its sixth energy call: both end, at the same step."""
    calls, kept = [], []

    def energy(x: Tensor) -> Tensor:
        calls.append(len(x))
        if rank == 1 and len(calls) == 6:
            interrupts._asked.append(Preempted)
        return TASK.energy(x)

    made = trainer(energy=energy, on_checkpoint=lambda trainer: kept.append(trainer.taken))
    result = made.train()
    interrupts._asked.clear()
    return {"preempted": result.preempted, "steps": made.taken, "kept": kept[-1]}


def resuming(rank: int) -> dict[str, Any]:
    """Bit for bit on as many processes, from every step; with a warning from a run of one."""
    states: dict[int, Any] = {}

    def keep(trainer: Trainer) -> None:
        def copied(tree: Any) -> Any:
            if isinstance(tree, Tensor):
                return tree.detach().clone()
            if isinstance(tree, dict):
                return {key: copied(value) for key, value in tree.items()}
            return type(tree)(map(copied, tree)) if isinstance(tree, list | tuple) else tree

        states[trainer.taken] = (copied(trainer.state()), copied(trainer.own_state()))

    whole = trainer(on_checkpoint=keep)
    whole.train()
    equal = []
    for state in states.values():
        resumed = trainer()
        resumed.restore(*state)
        resumed.train()
        pairs = zip(weights(resumed.unwrapped), weights(whole.unwrapped), strict=True)
        equal.append(resumed.history == whole.history and all(torch.equal(a, b) for a, b in pairs))
    other = trainer()
    common, own = states[6]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        other.restore({**common, "processes": 1}, own)
    other.train()
    return {
        "steps": sorted(states),
        "equal": equal,
        "warned": [str(one.message) for one in said if "processes" in str(one.message)],
        "other ended": other.taken,
        "calls": whole.history[-1]["energy_calls"],
    }


def uneven() -> str:
    return caught(ValueError, lambda: trainer(replace(CONFIG, batch_size=7)))


def main() -> None:
    torch.set_num_threads(1)
    rank = Processes(CPU).rank
    found = {
        "gradients": gradients(rank),
        "same noise": same_noise(rank),
        "diverged": diverged(rank),
        "uneven": uneven(),
        **{kind: failing(kind, rank) for kind in ("exception", "shape", "nan", "inf")},
        "stop": stopping(rank),
        "resume": resuming(rank),
    }
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
