"""`tiltune bench`: an update over its floor, two passes against the naive graph, and the log-ratio's error in nats.

Everything is a ratio of two things measured in turn in one run, so that the figures survive a busy machine.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...samplers.prior import Prior

DESCRIPTION = """Measure this machine: an on-policy update over its floor 2K·F + K·FB, the two-pass gradient against the naive
graph (time and peak memory at K = 20, 80, 320), and the log-ratio's error against float64.

example: tiltune bench --out bench.json
"""
NAIVE_STEPS = (20, 80, 320)
METHOD = {
    "update_over_floor": (
        "median over rounds of (update time) / (K bare forwards of B rows of prior and of policy + K bare forward-backwards, each"
        " at its best chunk), floor and update in turn; update = rollout, energy, log-ratio, objective gradient, two-pass"
        " backward, gradient clipping, Adam"
    ),
    "kept_mb": (
        "peak bytes of live storages that autograd saves (torch.autograd.graph.saved_tensors_hooks), each storage once,"
        " weights and trajectory states left out"
    ),
    "allocated_mb": (
        "allocator peak above the start of the update, trajectory states subtracted, a few [K, B] matrices included"
        " (CPU: torch.profiler memory events; CUDA: torch.cuda.max_memory_allocated)"
    ),
    "log_ratio_error": (
        "|Λ - Λ64| in nats, mean over trajectories of the float32 policy. arithmetic: Λ64 in float64 from the same float32"
        " network outputs; total: from float64 networks. drawn = from the noise drawn, stored = from stored states,"
        " subtracted = two float32 log-densities (what the library does not do)"
    ),
}


@dataclass(frozen=True)
class Options:
    """What is measured, and where."""

    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False
    """Fewer rounds and smaller batches: seconds, at the price of noisier ratios."""
    threads: int = 1
    """CPU threads of torch. More than one suffers badly on cores that are shared."""
    out: Path | None = None
    """A JSON file for all figures."""


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its trainable copy slightly moved, on a Brownian chain, with the batch of one update."""

    name: str
    prior: Prior
    policy: nn.Module
    batch: int

    @property
    def weights(self) -> list[Tensor]:
        return [*self.policy.parameters(), *self.policy.buffers()]


def make_case(name: Literal["mlp", "unet", "unet+lora"], steps: int, batch: int, device: str) -> Case:
    """Random weights; the policy is the prior moved until log-ratios are some nats, as after some training.

    'unet+lora' has rank-4 adapters on the prior's own network.
    """
    import torch

    from ...samplers.make_policy import make_policy, trainable_copy
    from ...samplers.mlp import MLPDenoiser
    from ...samplers.prior import Prior
    from ...samplers.schedulers.brownian import brownian_chain

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            network: Any = MLPDenoiser()
            torch.nn.init.normal_(network.outward.weight, std=0.1)
            shape: tuple[int, ...] = (2,)
            move = 1.5
        else:
            from diffusers.models.unets.unet_2d import UNet2DModel

            network = UNet2DModel(
                sample_size=16,
                in_channels=1,
                out_channels=1,
                layers_per_block=1,
                block_out_channels=(32, 64, 64),
                down_block_types=("DownBlock2D",) * 3,
                up_block_types=("UpBlock2D",) * 3,
                norm_num_groups=8,
            )
            shape, move = (1, 16, 16), 0.3
        prior = Prior(network.to(device), brownian_chain(steps), shape)
        policy = make_policy(prior, "lora", rank=4) if name == "unet+lora" else trainable_copy(prior)
        with torch.no_grad():
            for weight in (weight for weight in policy.parameters() if weight.requires_grad):
                if not weight.any():  # what adapters start at
                    weight += 0.02 * torch.randn(weight.shape).to(device)
                weight += move * weight.std(correction=0) * torch.randn(weight.shape).to(device)
    return Case(name, prior, policy, batch)


def quadratic(x: Tensor) -> Tensor:
    """½ ||x||², an energy that costs next to nothing."""
    return 0.5 * x.flatten(1).square().sum(1)


# --- the two updates ---------------------------------------------------------------------------------------------------


def two_pass_update(case: Case, generator: torch.Generator, chunk: int, on_states: Callable[[Tensor], None]) -> None:
    """The library's on-policy log-variance update, up to the gradient. ``on_states`` sees the trajectories' storage."""
    import torch

    from ...finetune.energies.energy import EnergyMeter
    from ...finetune.learning.gradients import backward_trajectories, objective_gradient
    from ...finetune.learning.objectives import OBJECTIVES, Batch
    from ...samplers.rollout import rollout

    trajectories = rollout(case.prior, case.policy, case.batch, generator)
    on_states(trajectories.states)
    assert trajectories.step_log_ratio is not None
    energy = EnergyMeter(quadratic)(case.prior.to_data(trajectories.terminal))
    batch = Batch(trajectories.step_log_ratio, energy, ~energy.isnan())
    log_z = torch.zeros((), device=energy.device, requires_grad=True)
    _, g = objective_gradient(OBJECTIVES["log_variance"], batch, 1.0, log_z)
    backward_trajectories(case.policy, case.prior.chain, trajectories, g, chunk)


def naive_update(case: Case, generator: torch.Generator, on_states: Callable[[Tensor], None]) -> None:
    """The same gradient with the graph of every step kept until one backward: 4K instead of 5K forward-equivalents."""
    import torch

    from ...finetune.learning.objectives import Batch, log_variance
    from ...samplers.denoiser import evaluate

    chain, device = case.prior.chain, case.prior.device
    states = torch.zeros((chain.num_steps + 1, case.batch, *case.prior.shape), device=device)
    on_states(states)
    ratios = []
    for step in range(chain.num_kernels):
        state = states[step]
        with torch.no_grad():
            prior_output = evaluate(case.prior.denoiser, chain, state, step, None)
        policy_output = evaluate(case.policy, chain, state, step, None)
        shift = chain.kernel.shift(state, step, policy_output, prior_output)
        with torch.no_grad():
            noise = torch.randn(state.shape, generator=generator, device=device)
            states[step + 1] = chain.kernel.mean(state, step, policy_output) + chain.kernel.std(step, state) * noise
        ratios.append(chain.kernel.log_ratio_from_states(noise + shift.detach(), shift))
    energy = quadratic(case.prior.to_data(states[-1]))
    log_variance(Batch(torch.stack(ratios), energy, ~energy.isnan()), 1.0, torch.zeros((), device=device)).backward()


def ignore(_: Tensor) -> None:
    """For updates whose memory is not being watched."""


# --- time --------------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one call, the accelerator's queue drained before and after."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each of ``rounds`` rounds, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = timed(run, device)
            if number:
                seconds[name].append(took)
    return seconds


def best_chunk(run: Callable[[int], None], sizes: list[int], device: str) -> int:
    """The chunk with the least time a row, each size measured in turn."""
    seconds = in_turn({str(size): lambda size=size: run(size) for size in sizes}, 3, device)
    return min(sizes, key=lambda size: min(seconds[str(size)]) / size)


def spans(total: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, total)) for first in range(0, total, chunk))


def update_over_floor(case: Case, rounds: int, device: str) -> dict[str, Any]:
    """An update, optimizer step included, over K·F of the prior, K·F of the policy and K·FB of the policy."""
    import torch

    from ...finetune.config.train import TrainConfig
    from ...finetune.learning.gradients import chunk_rows
    from ...samplers.rollout import rollout

    chain, batch, policy = case.prior.chain, case.batch, case.policy
    steps, total = chain.num_kernels, chain.num_kernels * case.batch
    generator = torch.Generator(device).manual_seed(0)
    optimizer = torch.optim.Adam([weight for weight in policy.parameters() if weight.requires_grad], 1e-6)
    probe = rollout(case.prior, policy, batch, generator)
    rows = probe.states[:-1].flatten(0, 1)
    labels = chain.timesteps[:steps].to(rows).repeat_interleave(batch)

    @torch.no_grad()
    def forward(part: slice) -> None:
        case.prior.denoiser(rows[part], labels[0])
        policy(rows[part], labels[0])

    def forward_backward(part: slice) -> None:
        policy(rows[part], labels[part]).sum().backward()

    sizes = [2**power for power in range(3, 14) if 2**power <= total]
    forward_chunk = best_chunk(lambda size: forward(slice(0, size)), [*(size for size in sizes if size < batch), batch], device)
    backward_chunk = best_chunk(lambda size: forward_backward(slice(0, size)), sizes, device)
    chunk = chunk_rows(policy, chain, probe, TrainConfig().memory_mb)

    def floor() -> None:
        for _ in range(steps):
            for part in spans(batch, forward_chunk):
                forward(part)
        for part in spans(total, backward_chunk):
            forward_backward(part)

    def update() -> None:
        two_pass_update(case, generator, chunk, ignore)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = in_turn({"floor": floor, "update": update}, rounds, device)
    ratios = [a / b for a, b in zip(seconds["update"], seconds["floor"], strict=True)]
    return {
        "network": case.name,
        "parameters": sum(weight.numel() for weight in policy.parameters() if weight.requires_grad),
        "steps": steps,
        "batch": batch,
        "chunk": chunk,
        "floor_chunks": [forward_chunk, backward_chunk],
        "floor_s": statistics.median(seconds["floor"]),
        "update_s": statistics.median(seconds["update"]),
        "update_over_floor": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


# --- memory ------------------------------------------------------------------------------------------------------------


class KeptBytes:
    """Counts the live storages that autograd saved, each once, and their peak; those of ignored tensors not at all."""

    def __init__(self, ignored: list[Tensor]) -> None:
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def ignore(self, tensor: Tensor) -> None:
        self.ignored.add(tensor.untyped_storage().data_ptr())

    def pack(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)

    def __enter__(self) -> KeptBytes:
        import torch

        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()


class _Kept:
    """One saved tensor; the graph lets go of it when it is freed."""

    def __init__(self, meter: KeptBytes, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor
        self.key, self.bytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        holders = meter.holders.get(self.key, 0)
        meter.holders[self.key] = holders + 1
        if not holders and self.key not in meter.ignored:
            meter.now += self.bytes
            meter.peak = max(meter.peak, meter.now)

    def __del__(self) -> None:
        meter = self.meter
        meter.holders[self.key] -= 1
        if not meter.holders[self.key]:
            del meter.holders[self.key]
            if self.key not in meter.ignored:
                meter.now -= self.bytes


def allocator_peak(run: Callable[[], None], device: str) -> int:
    """Bytes by which a call raises what the allocator holds, at its peak."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue] - missing from torch's stubs
        peak = max(peak, now)
    return peak


def two_pass_against_naive(batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time and both peaks of both updates at each number of steps."""
    import torch

    from ...finetune.config.train import TrainConfig
    from ...finetune.learning.gradients import chunk_rows
    from ...samplers.rollout import rollout

    rows: list[dict[str, Any]] = []
    generator = torch.Generator(device).manual_seed(0)
    for steps in NAIVE_STEPS:
        case = make_case("mlp", steps, batch, device)
        probe = rollout(case.prior, case.policy, batch, generator)
        chunk = chunk_rows(case.policy, case.prior.chain, probe, TrainConfig().memory_mb)
        runs: dict[str, Callable[[Callable[[Tensor], None]], None]] = {
            "two_pass": lambda see, case=case, chunk=chunk: two_pass_update(case, generator, chunk, see),
            "naive": lambda see, case=case: naive_update(case, generator, see),
        }
        row: dict[str, Any] = {"network": case.name, "steps": steps, "batch": batch, "chunk": chunk}
        seconds = in_turn({key: lambda run=run: run(ignore) for key, run in runs.items()}, rounds, device)
        row["time_ratio"] = statistics.median(a / b for a, b in zip(seconds["two_pass"], seconds["naive"], strict=True))
        states_bytes = 4 * (steps + 1) * batch * torch.Size(case.prior.shape).numel()
        for key, run in runs.items():
            with KeptBytes(case.weights) as kept:
                run(kept.ignore)
            row[f"{key}_s"] = statistics.median(seconds[key])
            row[f"{key}_kept_mb"] = kept.peak / 2**20
            row[f"{key}_allocated_mb"] = (allocator_peak(lambda run=run: run(ignore), device) - states_bytes) / 2**20
        for kind in ("kept", "allocated"):
            row[f"naive_over_two_pass_{kind}"] = row[f"naive_{kind}_mb"] / row[f"two_pass_{kind}_mb"]
            first = (rows[0] if rows else row)[f"two_pass_{kind}_mb"]
            row[f"over_first_{kind}"] = row[f"two_pass_{kind}_mb"] / first
        rows.append(row)
    return rows


# --- exactness ---------------------------------------------------------------------------------------------------------


def log_ratio_errors(case: Case, device: str) -> dict[str, Any]:
    """Mean |error| of Λ in nats: difference forms and subtracted log-densities, against two float64 references."""
    import copy

    import torch
    from torch.distributions import Normal

    from ...samplers.denoiser import Denoiser, evaluate
    from ...samplers.log_ratio import step_log_ratio
    from ...samplers.rollout import rollout

    chain, prior, policy = case.prior.chain, case.prior.denoiser, case.policy

    def single(network: Any) -> Denoiser:
        """The float32 network on float64 states; `evaluate` casts its output back."""
        return lambda state, timestep, condition=None: network(state.float(), timestep.float(), condition)

    drawn = rollout(case.prior, policy, case.batch, torch.Generator(device).manual_seed(1))
    assert drawn.step_log_ratio is not None
    subtracted = torch.zeros(case.batch, device=device)
    with torch.no_grad():
        for step in range(chain.num_kernels):
            state, following = drawn.states[step], drawn.states[step + 1]
            sigma = torch.tensor(chain.kernel.std(step, state), device=device)
            densities = [
                Normal(chain.kernel.mean(state, step, evaluate(network, chain, state, step, None)), sigma).log_prob(following)
                for network in (policy, prior)
            ]
            subtracted += densities[0].flatten(1).sum(1) - densities[1].flatten(1).sum(1)
    forms = {
        "drawn": drawn.step_log_ratio.sum(0),
        "stored": step_log_ratio(chain, prior, policy, drawn, case.batch).sum(0),
        "subtracted": subtracted,
    }
    wide = replace(drawn, states=drawn.states.double())
    pairs = {
        "arithmetic": (single(prior), single(policy)),
        "total": tuple(copy.deepcopy(network).double() for network in (prior, policy)),  # type: ignore[attr-defined]
    }
    errors: dict[str, Any] = {"network": case.name, "steps": chain.num_kernels, "batch": case.batch}
    errors["dimensions"] = torch.Size(case.prior.shape).numel()
    for kind, (wide_prior, wide_policy) in pairs.items():
        truth = step_log_ratio(chain, wide_prior, wide_policy, wide, case.batch).sum(0)
        errors["mean_abs_log_ratio"] = truth.abs().mean().item()
        errors[kind] = {form: (value.double() - truth).abs().mean().item() for form, value in forms.items()}
    return errors


# --- the verb ----------------------------------------------------------------------------------------------------------


def measure(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All figures, each said as soon as it is known."""
    import torch

    device, quick = options.device, options.quick
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here; leave it out to measure the CPU.")
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {options.threads} thread(s)"
    results: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "method": METHOD}
    say(f"machine: {machine}, torch {torch.__version__}")

    say("\nupdate time over its floor 2K·F + K·FB (log_variance, on-policy); trained parameters")
    say(f"{'network':10}{'parameters':>11}{'K':>5}{'B':>6}{'chunk':>7}{'floor s':>10}{'update s':>10}{'ratio':>8}  quartiles")
    results["update"] = []
    rounds = 3 if quick else 9
    steps, batch = (2, 16) if quick else (4, 32)
    sizes: list[tuple[Literal["mlp", "unet", "unet+lora"], int, int]]
    sizes = [("mlp", 20, 512), ("mlp", 20, 2048), ("unet", steps, batch), ("unet+lora", steps, batch)]
    for name, steps, batch in sizes:
        row = update_over_floor(make_case(name, steps, batch, device), rounds * (3 if name == "mlp" else 1), device)
        results["update"].append(row)
        low, high = row["quartiles"]
        say(
            f"{name:10}{row['parameters']:11d}{steps:5d}{batch:6d}{row['chunk']:7d}{row['floor_s']:10.3f}"
            f"{row['update_s']:10.3f}{row['update_over_floor']:8.3f}  {low:.3f}-{high:.3f}"
        )

    say("\ntwo passes against the naive graph, in time and peak memory, trajectory states subtracted")
    say("(kept: by autograd; allocated: in all, the [K, B] matrices too; growth: over two passes at K = 20)")
    say(f"{'network':8}{'K':>5}{'B':>6}{'chunk':>7}{'time':>7}{'MB':>9}{'naive':>9}{'ratio':>7}{'growth':>8}")
    results["two_pass"] = two_pass_against_naive(1024, 1 if quick else 3, device)
    for row in results["two_pass"]:
        for kind in ("kept", "allocated"):
            say(
                f"{row['network']:8}{row['steps']:5d}{row['batch']:6d}{row['chunk']:7d}{row['time_ratio']:7.2f}"
                f"{row[f'two_pass_{kind}_mb']:9.2f}{row[f'naive_{kind}_mb']:9.2f}{row[f'naive_over_two_pass_{kind}']:7.1f}"
                f"{row[f'over_first_{kind}']:8.3f}  {kind}"
            )

    say("\nlog-ratio's error in nats against float64, mean over trajectories")
    say(f"{'network':8}{'dim':>5}{'K':>5}{'|Λ|':>8}  {'':11}{'drawn':>10}{'stored':>10}{'subtracted':>12}")
    results["log_ratio"] = []
    sizes = [("mlp", 100, 512), ("unet", 20, 16)]
    for name, steps, batch in sizes:
        row = log_ratio_errors(make_case(name, steps, batch, device), device)
        results["log_ratio"].append(row)
        for kind in ("arithmetic", "total"):
            value = row[kind]
            say(
                f"{name:8}{row['dimensions']:5d}{steps:5d}{row['mean_abs_log_ratio']:8.3g}  {kind:11}"
                f"{value['drawn']:10.1e}{value['stored']:10.1e}{value['subtracted']:12.1e}"
            )
    return results


def main(argv: list[str]) -> int:
    """Parse, measure, print, write; returns the exit status."""
    import tyro

    options = tyro.cli(Options, args=argv, prog="tiltune bench", description=DESCRIPTION)
    results = measure(options)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwrote {options.out}")
    return 0
