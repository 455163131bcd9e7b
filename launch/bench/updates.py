"""The same update twice: as the library makes it, in two passes, and with the graph of every step kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...finetune.energies.energy import EnergyMeter
from ...finetune.learning.batch import Batch
from ...finetune.learning.gradients import backward_trajectories, objective_gradient
from ...finetune.learning.objective_table import OBJECTIVES
from ...finetune.learning.objectives import log_variance
from ...samplers.denoiser import evaluate
from ...samplers.rollout import rollout
from .case import Case, quadratic


def two_pass_update(case: Case, generator: torch.Generator, chunk: int, on_states: Callable[[Tensor], None]) -> None:
    """The library's on-policy log-variance update, up to the gradient. ``on_states`` sees the trajectories' storage."""
    trajectories = rollout(case.prior, case.policy, case.batch, generator)
    on_states(trajectories.states)
    assert trajectories.step_log_ratio is not None
    energy = EnergyMeter(quadratic)(case.prior.to_data(trajectories.terminal))
    batch = Batch(trajectories.step_log_ratio, energy, ~energy.isnan())
    _, gradients = objective_gradient(OBJECTIVES["log_variance"], batch, 1.0, torch.zeros(1, device=energy.device))
    backward_trajectories(case.policy, case.prior.chain, trajectories, gradients["step_log_ratio"], chunk)


def naive_update(case: Case, generator: torch.Generator, on_states: Callable[[Tensor], None]) -> None:
    """The same gradient with the graph of every step kept until one backward: 4K instead of 5K forward-equivalents."""
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
