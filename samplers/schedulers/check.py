"""A table's rows against the real ``scheduler.step``, and what the last step becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Real
from torch import Tensor

from ..chain import SIGMA_ZERO, Chain
from ..shapes import States, Timestep
from .options import LastStep

SchedulerStep = Callable[[States, Timestep, States, torch.Generator], States]
FAINT = 0.02  # standard deviation of a kernel, where data have about 1: 2.5 gray levels of 255
DELICATE = 4.0  # what a change of the network's output moves at a kernel, in sigmas, over the same at the kernel before
# A row's misfit against scheduler.step, relative to the larger of 1 and the state's size (float32 schedules).
MISFIT = 1e-6


def checked(
    scheduler: Any,
    step: SchedulerStep,
    last_step: LastStep,
    chain: Chain,
    dtype: torch.dtype = torch.float64,
) -> Chain:
    """The chain after its rows are checked against the scheduler, with the last step settled.

    step: (output, timestep, state, generator) → next state, by the scheduler. last_step, dtype: as in `chain_from_scheduler` and
    `table_misfit`. ``chain`` comes with its last step given to the prior.

    Errors: ValueError for a table that misses the scheduler's steps, and for a ``last_step`` that does not fit.
    """
    misfit = table_misfit(chain, scheduler.timesteps, step, dtype)
    if not misfit <= MISFIT:
        raise ValueError(
            f"{chain.name}: the table misses scheduler.step by {misfit:.2g} (bar {MISFIT:g}); this scheduler configuration"
            " steps in a way the table does not hold. Please report the scheduler's config."
        )
    quiet = chain.sigma[-1].item() < SIGMA_ZERO
    if isinstance(last_step, str):
        if last_step != "prior":
            raise ValueError(f"last_step is {last_step!r}; it is 'prior' or a positive standard deviation.")
        return _leaving_last_to_prior(chain if quiet else replace(chain, trained=tuple(range(chain.num_steps))))
    if last_step < SIGMA_ZERO:
        raise ValueError(f"last_step={last_step:g} leaves the log-ratio undefined; give a positive sigma or 'prior'.")
    if not quiet:
        raise ValueError(
            f"{chain.name} already draws sigma {chain.sigma[-1].item():.3g} in its last step, so last_step={last_step:g} would"
            " change the prior; leave last_step='prior'."
        )
    sigma = chain.sigma.clone()
    sigma[-1] = last_step
    return replace(chain, sigma=sigma, trained=tuple(range(chain.num_steps)))


def _leaving_last_to_prior(chain: Chain) -> Chain:
    """The same chain, its last kernels given to the prior too where they are hardly any noise.

    A DDPM on 'leading' timesteps ends with sigma .01 after .15 (K = 20). Such a kernel has nothing to tell an energy, but every
    change of the network, wherever it was wanted, costs nats there: a hundred times as many as at the kernel before.
    """
    rows, moves = chain.num_kernels, chain.sensitivity
    while rows > 1 and chain.sigma[rows - 1] < FAINT and moves[rows - 1] > DELICATE * moves[rows - 2]:
        rows -= 1
    return replace(chain, trained=tuple(range(rows)))


def table_misfit(
    chain: Chain,
    timesteps: Real[Tensor, " steps"],
    step: SchedulerStep,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Largest |table - scheduler.step| over all rows, relative to the larger of 1, the state's and the result's size.

    dtype: what the scheduler is handed; float32 for one that draws its noise in float32 whatever it is given.
    """
    generator = torch.Generator().manual_seed(0)
    reach = 2 * (chain.clip or 1.0)
    worst = 0.0
    for k, t in enumerate(timesteps):
        x = reach * (2 * torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64) - 1)
        state = chain.signal[k] * x + chain.noise[k] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        p, q = chain.p[k].item(), chain.q[k].item()
        # An output whose x_hat lies inside the clip range for some coordinates and outside for others.
        output = (reach * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1) - p * state) / q
        state, output = state.to(dtype).double(), output.to(dtype).double()
        theirs = step(output.to(dtype), t, state.to(dtype), torch.Generator().manual_seed(k)).double()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=dtype).double()
        ours = chain.kernel.sample(state, k, output, noise)
        # A long first step of Euler ancestral (sigma 157 to 3 at K = 3) rounds at the state's size, not at the result's.
        scale = max(1.0, state.abs().max().item(), theirs.abs().max().item())
        worst = max(worst, (ours - theirs).abs().max().item() / scale)
    return worst
