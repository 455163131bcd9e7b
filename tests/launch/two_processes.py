"""Run by torchrun in two processes: what happens between them, one scenario after the other, as JSON.

Started by test_processes.py as `python -m torch.distributed.run … two_processes.py OUT`.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.distributed import sharding, signals
from tiltune.finetune.distributed.processes import Processes
from tiltune.finetune.distributed.sharding import collect, shard
from tiltune.finetune.distributed.signals import Preempted, ProcessError
from tiltune.finetune.learning.batch import Batch
from tiltune.finetune.learning.gradients import backward_trajectories, objective_gradient
from tiltune.finetune.learning.objective_table import OBJECTIVES, objective_of
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.runs.export import export_policy
from tiltune.launch.cluster.torchrun import end_at_once
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler
from toys.linear_gaussian import LinearGaussian

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    objective="reinforce_kl",
    soft_value_updates=2,
    forward_rows=8,
    population_size=40,
    population="importance",
    warm_start_updates=4,
    warm_start_rows=16,
    updates=4,
    batch_size=8,
    monitor_every=2,
    tempering_ess=0.8,
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
    """One process with eight trajectories (1 x 8), two with four (2 x 4), two with twice two (4 x 2): the largest difference
    of gradient and loss, relative to the largest entry; of one condition, and of two in turn."""
    found = {}
    prior = TASK.prior()
    processes = Processes(CPU)
    parts = objective_of(TrainConfig(objective="trust_pcl", horizon=2, soft_value_updates=1))
    objectives = OBJECTIVES | {"trust_pcl, horizon 2": parts}
    for name, (objective, conditions) in {
        f"{name}, {conditions}": (objective, conditions) for name, objective in objectives.items() for conditions in (1, 2)
    }.items():
        single = Policy(prior, policy())
        drawn = rollout(prior, single, 8, torch.Generator().manual_seed(3))
        drawn = drawn.with_(energy=TASK.energy(drawn.terminal))
        loss, gradient = gradient_of(objective, prior, single, drawn, len(drawn), conditions=conditions)
        part = drawn.select(torch.arange(4) + 4 * rank)
        wrapped = processes.wrap(Policy(prior, policy()))
        for split, at_once in (("2 x 4", 4), ("4 x 2", 2)):
            theirs, shared = gradient_of(objective, prior, wrapped, part, at_once, processes, conditions)
            found[f"{name} {split}"] = max(difference(shared, gradient), abs(loss - theirs) / max(1.0, abs(loss)))
        # The control: without the last, shared pass the gradient is this process's own.
        with processes.no_sync(wrapped):
            _, own = gradient_of(objective, prior, wrapped, part, 4, processes, conditions)
        found[f"{name}, not shared"] = difference(own, gradient)
    return found


def gradient_of(
    objective: Any,
    prior: Prior,
    policy: Any,
    part: Any,
    at_once: int,
    processes: Processes | None = None,
    conditions: int = 1,
) -> tuple[float, list[Tensor]]:
    """(loss, gradients of the weights, of a value's and of log Z), ``at_once`` trajectories a backward pass."""
    with torch.no_grad():
        ratio = step_log_ratio(prior.chain, prior.denoiser, policy, part)
    group = torch.arange(len(part)) % conditions
    value = part.states[list(prior.chain.trained)].sin().sum(2) if objective.learns_soft_value else None
    batch = Batch(ratio, part.energy, torch.ones(len(part), dtype=torch.bool), ratio.sum(0), value, group=group)
    log_z = torch.tensor([0.2, -0.3][:conditions])
    shared: dict[str, Any] = {}
    if processes is not None:
        shared = {"gather": processes.gather, "rank": processes.rank, "world_size": processes.count}
    loss, gradients = objective_gradient(objective, batch, 0.7, log_z, **shared)
    g = gradients["step_log_ratio"]
    held = {} if processes is None else {"no_sync": lambda: processes.no_sync(policy)}
    backward_trajectories(policy, prior.chain, part, g, at_once * prior.chain.num_kernels, **held)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    found = [weight.grad.full_tensor() if hasattr(weight, "full_tensor") else weight.grad.clone() for weight in trained]
    policy.zero_grad()
    if objective.learns_soft_value:  # as of a value with two weights
        state = part.states[list(prior.chain.trained)]
        by_value = (gradients["soft_value"][..., None] * state).sum((0, 1))
        found.append(by_value if processes is None else processes.mean_of(by_value))
    return loss.item(), [*found, gradients.get("log_z", torch.zeros(1))]


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    worst = max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))
    return worst / max(b.abs().max().item() for b in others)


# --- in shards --------------------------------------------------------------------------------------------------------


@contextmanager
def fsdp() -> Iterator[None]:
    """What `tiltune launch --fsdp` sets."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    yield
    del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"]


@contextmanager
def units_of(weights: int) -> Iterator[None]:
    """What is a unit, in the size of the networks here."""
    before, sharding.UNIT = sharding.UNIT, weights
    yield
    sharding.UNIT = before


def images(folder: Path) -> Path:
    """A DDPMPipeline of 4 x 4 images, with a network that has lists of blocks in lists of blocks."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, **blocks
    )
    DDPMPipeline(network, DDPMScheduler(variance_type="fixed_large", clip_sample=False)).save_pretrained(folder)
    return folder


def sharded_gradients(rank: int, prior: Prior) -> dict[str, Any]:
    """The gradient in shards, of many units and of one, and with gradient checkpointing, against that of whole copies."""
    objective = OBJECTIVES["rtb"]
    drawn = rollout(prior, None, 8, torch.Generator().manual_seed(3))
    drawn = drawn.with_(energy=drawn.terminal.flatten(1).mean(1))
    part = drawn.select(torch.arange(4) + 4 * rank)
    made = [*(make_policy(prior) for _ in range(3)), make_policy(prior, gradient_checkpointing=True)]
    for policy in made:
        with torch.no_grad():  # away from the prior, where the gradient of many objectives is 0
            for weight in policy.parameters():
                weight.mul_(1.1)
    _, single = gradient_of(objective, prior, made[0], drawn, 8)
    processes = Processes(CPU)
    _, expected = gradient_of(objective, prior, processes.wrap(made[0]), part, 2, processes)
    found: dict[str, Any] = {"whole": difference(expected, single)}
    with fsdp():
        processes = Processes(CPU)
    for name, policy, unit in (("many", made[1], 100), ("one", made[2], 10**9), ("checkpointed", made[3], 100)):
        with units_of(unit):
            sharded = shard(policy, CPU, 2)
        _, theirs = gradient_of(objective, prior, sharded, part, 2, processes)
        found[name] = difference(theirs, expected)
        held = sum(weight.to_local().numel() for weight in sharded.parameters())  # type: ignore[operator]
        found[f"{name} held"] = held / sum(weight.numel() for weight in sharded.parameters())
        if name == "many":
            found["units"] = sum("FSDP" in type(module).__name__ for module in sharded.modules())
            _, theirs = gradient_of(objective, prior, sharded, drawn.select(torch.arange(4)), 2, processes)
            found["control"] = difference(theirs, expected)  # both have the first half
    return found


def exported(rank: int, folder: Path, sharded: bool) -> dict[str, Any]:
    """What a short training leaves, as diffusers loads it: its output beside that of the policy that the training calls."""
    prior = load_prior(images(folder / f"prior-{rank}-{sharded}"), steps=4)
    # A budget that takes several passes: how many follows from a measurement, which must be the same everywhere.
    config = replace(CONFIG, learning_rate=1e-3, warm_start_learning_rate=1e-4, ema_decay=0.0, memory_mb=0.2)
    config = replace(config, population_size=6)  # too few to hold any out: what a short training leaves is kept, better or not
    with fsdp() if sharded else warnings.catch_warnings(), units_of(100):
        made = Trainer(prior, lambda x: 5 * x.flatten(1).mean(1), config, progress=False)
    result = made.train()
    out = folder / f"export-{rank}-{sharded}"
    export_policy(result.policy, "pipeline", out)
    state, time = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 20, 500, 990])
    with torch.no_grad():
        live = made.state.wrapped(state, time)
        loaded = DDPMPipeline.from_pretrained(out).unet(state, time).sample
        before = prior.denoiser(state, time, None)
    return {
        "exported": (live - loaded).abs().max().item(),
        "moved": (live - before).abs().max().item(),
        "live": live.flatten().tolist(),
        "chunk": made.state.preparation.forward_kl._chunk,  # pyright: ignore[reportOptionalMemberAccess]
    }


def collected(prior: Prior) -> dict[str, float]:
    """`collect` brings a whole policy up to date, and nothing else does."""
    policy = make_policy(prior)
    with units_of(100):
        sharded = shard(policy, CPU, 2)
    with torch.no_grad():
        for weight in sharded.parameters():
            weight.mul_(1.1)
        state, time = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 500])
        live, stale = sharded(state, time), policy(state, time)
        collect(sharded, policy)
        return {"before": (live - stale).abs().max().item(), "after": (live - policy(state, time)).abs().max().item()}


def refused(prior: Prior) -> list[str]:
    made = [make_policy(prior, "lora", rank=1), make_policy(prior, "residual"), make_policy(prior)]
    made[-1].to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    said = [caught(ValueError, lambda policy=policy: shard(policy, CPU, 2)) for policy in made]
    with fsdp():
        os.environ["FSDP_VERSION"] = "1"
        said.append(caught(ValueError, lambda: Processes(CPU)))
    with fsdp():
        os.environ["FSDP_OFFLOAD_PARAMS"] = "true"
        said.append(caught(ValueError, lambda: Processes(CPU)))
        del os.environ["FSDP_OFFLOAD_PARAMS"]
    return said


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
    """Process 1 breaks in the energy call of its last update: what each raises, and whether all then save a checkpoint."""
    calls, kept = [], []

    def energy(x: Tensor) -> Tensor:
        calls.append(len(x))
        if rank == 1 and len(calls) == 11:
            if kind == "exception":
                raise RuntimeError("the scorer is gone")
            if kind == "shape":
                return torch.zeros(len(x), 2)
            return torch.full((len(x),), {"nan": float("nan"), "inf": float("inf")}[kind])
        return TASK.energy(x)

    made = trainer(energy=energy, on_checkpoint=lambda trainer: kept.append(together(trainer)))
    if kind == "decoder":
        decode = made.state.prior.to_data

        def broken(state: Tensor) -> Tensor:
            if rank == 1 and len(calls) >= 10:
                raise MemoryError("out of memory")
            return decode(state)

        made.state.prior.to_data = broken
    raised = caught(Exception, made.train)
    return {"raised": raised, "steps": made.global_step, "kept": kept[-1] if kept else None}


def together(trainer: Trainer) -> int:
    """A checkpoint takes all processes: one that is asked for it alone waits here for ever."""
    return int(trainer.state.processes.mean(trainer.global_step))


def stopping(rank: int) -> dict[str, Any]:
    """Process 1 alone is asked to stop, in its ninth energy call: both end, at the same step."""
    calls, kept = [], []

    def energy(x: Tensor) -> Tensor:
        calls.append(len(x))
        if rank == 1 and len(calls) == 9:
            signals._asked.append(Preempted)
        return TASK.energy(x)

    made = trainer(energy=energy, on_checkpoint=lambda trainer: kept.append(together(trainer)))
    result = made.train()
    signals._asked.clear()
    return {"preempted": result.preempted, "steps": made.global_step, "kept": kept[-1]}


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

        # As from the file: what is common is what process 0 wrote.
        common = [copied(trainer.state_dict())]
        torch.distributed.broadcast_object_list(common)
        states[trainer.global_step] = (common[0], copied(trainer.own_state_dict()))

    whole = trainer(on_checkpoint=keep)
    whole.train()
    equal = []
    for state in states.values():
        resumed = trainer()
        resumed.load_state_dict(*state)
        resumed.train()
        pairs = zip(weights(resumed.collected()), weights(whole.collected()), strict=True)
        equal.append(resumed.history == whole.history and all(torch.equal(a, b) for a, b in pairs))
    other = trainer()
    common, own = states[6]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        alone = {"processes": {**common["processes"], "count": 1}, "energies": {**common["energies"], "counts": [[80, 0, 0, 0]]}}
        other.load_state_dict({**common, **alone}, own)
    other.train()
    return {
        "steps": sorted(states),
        "equal": equal,
        "warned": [str(one.message) for one in said if "processes" in str(one.message)],
        "other ended": other.global_step,
        "calls": whole.history[-1]["energy_calls"],
    }


def one_critic() -> dict[str, Any]:
    """By how much the values of a horizon differ between the processes after a training, and what they learned with it."""
    config = replace(CONFIG, objective="trust_pcl", horizon=2, forward_rows=0)
    training = trainer(config)
    training.train()
    state, value = training.state, training.state.critic.value
    begun = state.preparation.soft_value
    assert value is not None and begun is not None
    own = torch.cat([tensor.detach().double().flatten() for one in value.networks for tensor in one.state_dict().values()])
    first = torch.cat([tensor.double().flatten() for one in begun.networks for tensor in one.state_dict().values()])
    every, before = state.processes.gather(own[None]), state.processes.gather(first[None])
    return {"apart": (every[0] - every[1]).abs().max().item(), "populations": (before[0] - before[1]).abs().max().item()}


def reused() -> dict[str, Any]:
    """Several epochs with a clip on what is drawn and replayed, a share of the steps: how far the processes' policies are apart,
    and how far they came."""
    shared = replace(CONFIG, objective="rtb", forward_rows=0, epochs=3, clip=0.2, step_share=0.5)
    training = trainer(replace(shared, behavior={"on_policy": 0.5, "replay": 0.5}))
    before = torch.cat([weight.detach().flatten().clone() for weight in training.state.policy.parameters()])
    training.train()
    own = torch.cat([weight.detach().flatten() for weight in training.state.policy.parameters()])
    every = training.state.processes.gather(own[None])
    return {"apart": (every[0] - every[1]).abs().max().item(), "moved": (own - before).abs().max().item()}


def uneven() -> str:
    return caught(ValueError, lambda: trainer(replace(CONFIG, batch_size=7)))


def main() -> None:
    torch.set_num_threads(1)
    rank, folder = Processes(CPU).rank, Path(sys.argv[1])
    prior = load_prior(images(folder / f"prior-{rank}"), steps=4)
    found = {
        "gradients": gradients(rank),
        "same noise": same_noise(rank),
        "diverged": diverged(rank),
        "uneven": uneven(),
        **{kind: failing(kind, rank) for kind in ("exception", "decoder", "shape", "nan", "inf")},
        "stop": stopping(rank),
        "resume": resuming(rank),
        "critic": one_critic(),
        "reused": reused(),
        "shards": sharded_gradients(rank, prior),
        "collected": collected(prior),
        "refused": refused(prior),
        "exported": {name: exported(rank, folder, name == "fsdp") for name in ("ddp", "fsdp")},
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    end_at_once(0)


if __name__ == "__main__":
    main()
