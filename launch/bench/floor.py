"""The time of an update over its floor: the network calls that it cannot do without."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from ...finetune.config.train import TrainConfig
from ...finetune.learning.gradients import chunk_rows
from ...samplers.rollout import rollout
from .case import Case
from .timing import best_chunk, in_turn
from .updates import ignore, two_pass_update


def update_over_floor(case: Case, rounds: int, device: str) -> dict[str, Any]:
    """An update, optimizer step included, over K·F of the prior, K·F of the policy and K·FB of the policy."""
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
            for part in _spans(batch, forward_chunk):
                forward(part)
        for part in _spans(total, backward_chunk):
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


def _spans(total: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, total)) for first in range(0, total, chunk))
