"""Exact samples of the tilted prior: a policy proposes, weights decide, and copies move on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...finetune.certificate.criteria import MAX_PARETO_K
from ...finetune.energies.energy import EnergyMeter
from ...finetune.learning.soft_value import SoftValue
from ...finetune.runs.bar import progress_bar
from ...finetune.runs.run import Run
from ...finetune.weight_tail import pareto_k
from ...samplers.condition import Condition, context_of, members
from ...samplers.denoiser import estimated_data
from ...samplers.moves import PARTS
from ...samplers.policy import Policy
from ...samplers.prior import Prior
from ...samplers.resample_move import SWEEPS, move
from ...samplers.resampling import Resampled, importance_resample
from ...samplers.streams import stream
from ...samplers.twist import Twist


@dataclass(frozen=True, eq=False)
class Exact:
    """Samples of one condition ("" where there is none).

    moved: how many differ from their proposal after ``sweeps`` of moves. energy_calls: for all of it.
    """

    name: str
    samples: Tensor
    resampled: Resampled
    moved: int
    sweeps: int
    energy_calls: int

    def told(self) -> dict[str, float]:
        """What stands beside the samples in their file."""
        drawn = self.resampled
        numbers = {"proposals": len(drawn.log_weight), "ess": drawn.ess, "unique": drawn.unique, "sweeps": self.sweeps}
        if drawn.strength is not None:
            numbers["strength"] = drawn.strength
        return {**numbers, "moved": self.moved, "energy_calls": self.energy_calls}


def draw_exact(
    run: Run,
    condition: Condition | None,
    count: int,
    *,
    proposals: int | None,
    sweeps: int | None,
    candidates: int,
    terms: Sequence[str],
    seed: int,
) -> list[Exact]:
    """Exact samples of each condition, as far as the weights carry; in the order of the table.

    condition: of the ``count`` samples. proposals, sweeps: of each condition; their defaults where None.
    candidates: that each step chooses from by the run's soft value, 1 for none. terms: of the energy.

    Errors: ValueError where candidates are asked of a run without a soft value.
    """
    soft_value = run.soft_value if candidates > 1 else None
    meter, generator = EnergyMeter(run.energy(terms)), stream("resampling", seed, run.prior.device)
    if condition is None:
        parts = [("", 0, run.policy, count)]
    else:
        sizes = [len(index) for index in members(condition.group, len(condition.table))]
        parts = [(condition.table.names[row], row, run.policy.only(row), size) for row, size in enumerate(sizes) if size]

    def one(name: str, row: int, policy: Policy, count: int) -> Exact:
        def log_potential(data: Tensor) -> Tensor:
            return -meter(data, **context_of(policy.prior.condition(len(data)))) / run.config.train.alpha

        twist = None if soft_value is None else Twist(partial(_value, policy.prior, soft_value, row), candidates)
        total, before = proposals if proposals is not None else max(10 * count, 1000), meter.calls
        with progress_bar(total, "proposals") as advance:
            drawn = importance_resample(
                policy, log_potential, count, generator, proposals=total, twist=twist, on_progress=advance
            )
        wanted = SWEEPS * (drawn.unique < count) if sweeps is None else sweeps
        if not wanted:
            return Exact(name, drawn.samples, drawn, 0, 0, meter.calls - before)
        with progress_bar(count * wanted * PARTS, "moves") as advance:
            samples, moved = move(policy, log_potential, drawn, generator, wanted, advance)
        return Exact(name, samples, drawn, int(moved.sum()), wanted, meter.calls - before)

    return [one(*part) for part in parts]


def _value(prior: Prior, soft_value: SoftValue, row: int, state: Tensor, k: int) -> Tensor:
    """log h of states at step ``k``, nats. prior: of one condition, which is the ``row`` of those that the soft value knows."""
    step, group = (torch.full((len(state),), number, device=state.device) for number in (k, row))
    return soft_value(estimated_data(prior.denoiser, prior.chain, state, step, prior.condition(len(state))), step, group)


def trust(exact: Exact) -> str:
    """The effective number of proposals, and what it means, in a sentence."""
    drawn, count = exact.resampled, len(exact.samples)
    tail = pareto_k(drawn.log_weight)
    head = f"{exact.name}: " if exact.name else ""
    head += f"effective proposals: {drawn.ess:.0f} of {len(drawn.log_weight)}, {drawn.unique} different ones among the {count}"
    head += " samples."
    if drawn.strength is not None:
        head += f" The soft value chose among candidates with strength {drawn.strength:.2f} (0: not at all, 1: as it is)."
    if exact.sweeps:
        head += (
            f" {exact.moved} of {count} were then changed by Metropolis moves that keep the law ({exact.energy_calls:,} energy"
        )
        head += " calls in all)."
    if drawn.ess < 100 or tail > MAX_PARETO_K:
        why = f"the heaviest of them carries {drawn.largest_weight:.0%} of the weight, Pareto-k {tail:.2f}"
        return f"{head} Too few to trust ({why}): raise --proposals, or train further."
    return (
        f"{head} Averages over them are as accurate as over {min(drawn.ess, count):.0f} independent exact samples; what the"
        " policy never proposes stays missing, which `tiltune evaluate` looks for."
    )
