"""All metrics of `tiltune bench`, as tables that are printed and as values that JSON can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .case import Network, make_case
from .exactness import log_ratio_errors
from .floor import update_over_floor
from .precision import SHAPE, STEPS, half_precision
from .two_pass import two_pass_against_naive

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
    "bf16": (
        "LoRA of rank 4 on a small UNet2DConditionModel, states and log-ratios float32, networks under bf16 autocast; move:"
        " standard deviation of the adapters' second factor. error: mean |Λ of bf16 networks - Λ of float32 networks| on the same"
        " states; kl, kl_float32: mean of the sum of ½|δ|² by both"
    ),
}


def measure(device: str, threads: int, quick: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All metrics, each said as soon as it is known.

    device: "cpu" or "cuda". threads: of torch, on the CPU. quick: fewer rounds and smaller batches.

    Errors: ValueError where torch sees no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here; leave it out to measure the CPU.")
    torch.set_num_threads(threads)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {threads} thread(s)"
    say(f"machine: {machine}, torch {torch.__version__}")
    return {
        "machine": machine,
        "torch": torch.__version__,
        "method": METHOD,
        "update": _updates(device, quick, say),
        "two_pass": _two_passes(device, quick, say),
        "log_ratio": _log_ratios(device, say),
        "bf16": _half_precision(device, say),
    }


def _updates(device: str, quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    say("\nupdate time over its floor 2K·F + K·FB (log_variance, on-policy); trained parameters")
    say(f"{'network':10}{'parameters':>11}{'K':>5}{'B':>6}{'chunk':>7}{'floor s':>10}{'update s':>10}{'ratio':>8}  quartiles")
    rows = []
    rounds = 3 if quick else 9
    few, small = (2, 16) if quick else (4, 32)
    sizes: list[tuple[Network, int, int]] = [("mlp", 20, 512), ("mlp", 20, 2048), ("unet", few, small), ("unet+lora", few, small)]
    for name, steps, batch in sizes:
        row = update_over_floor(make_case(name, steps, batch, device), rounds * (3 if name == "mlp" else 1), device)
        rows.append(row)
        low, high = row["quartiles"]
        say(
            f"{name:10}{row['parameters']:11d}{steps:5d}{batch:6d}{row['chunk']:7d}{row['floor_s']:10.3f}"
            f"{row['update_s']:10.3f}{row['update_over_floor']:8.3f}  {low:.3f}-{high:.3f}"
        )
    return rows


def _two_passes(device: str, quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    say("\ntwo passes against the naive graph, in time and peak memory, trajectory states subtracted")
    say("(kept: by autograd; allocated: in all, the [K, B] matrices too; growth: over two passes at K = 20)")
    say(f"{'network':8}{'K':>5}{'B':>6}{'chunk':>7}{'time':>7}{'MB':>9}{'naive':>9}{'ratio':>7}{'growth':>8}")
    rows = two_pass_against_naive(1024, 1 if quick else 3, device)
    for row in rows:
        for kind in ("kept", "allocated"):
            say(
                f"{row['network']:8}{row['steps']:5d}{row['batch']:6d}{row['chunk']:7d}{row['time_ratio']:7.2f}"
                f"{row[f'two_pass_{kind}_mb']:9.2f}{row[f'naive_{kind}_mb']:9.2f}{row[f'naive_over_two_pass_{kind}']:7.1f}"
                f"{row[f'over_first_{kind}']:8.3f}  {kind}"
            )
    return rows


def _log_ratios(device: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    say("\nlog-ratio's error in nats against float64, mean over trajectories")
    say(f"{'network':8}{'dim':>5}{'K':>5}{'|Λ|':>8}  {'':11}{'drawn':>10}{'stored':>10}{'subtracted':>12}")
    rows = []
    sizes: list[tuple[Network, int, int]] = [("mlp", 100, 512), ("unet", 20, 16)]
    for name, steps, batch in sizes:
        row = log_ratio_errors(make_case(name, steps, batch, device), device)
        rows.append(row)
        for kind in ("arithmetic", "total"):
            value = row[kind]
            say(
                f"{name:8}{row['dimensions']:5d}{steps:5d}{row['mean_abs_log_ratio']:8.3g}  {kind:11}"
                f"{value['drawn']:10.1e}{value['stored']:10.1e}{value['subtracted']:12.1e}"
            )
    return rows


def _half_precision(device: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    say(f"\nlog-ratio of bf16 networks, states {' x '.join(map(str, SHAPE))}, K = {STEPS}, LoRA; nats")
    say(f"{'move':>8}{'|Λ|':>10}{'off float32':>13}{'KL':>10}{'KL, float32':>13}")
    rows = half_precision(device)
    for row in rows:
        say(f"{row['move']:8.0e}{row['log_ratio']:10.3g}{row['error']:13.3g}{row['kl']:10.3g}{row['kl_float32']:13.3g}")
    return rows
