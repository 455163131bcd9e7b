"""The error of the log-ratio in nats, against float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch.distributions import Normal

from ...samplers.denoiser import Denoiser, evaluate
from ...samplers.log_ratio import step_log_ratio
from ...samplers.rollout import rollout
from .case import Case


def log_ratio_errors(case: Case, device: str) -> dict[str, Any]:
    """Mean |error| of Λ in nats: difference forms and subtracted log-densities, against two float64 references."""
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
        "total": tuple(copy.deepcopy(network).double() for network in (prior, policy)),
    }
    errors: dict[str, Any] = {"network": case.name, "steps": chain.num_kernels, "batch": case.batch}
    errors["dimensions"] = torch.Size(case.prior.shape).numel()
    for kind, (wide_prior, wide_policy) in pairs.items():
        truth = step_log_ratio(chain, wide_prior, wide_policy, wide, case.batch).sum(0)
        errors["mean_abs_log_ratio"] = truth.abs().mean().item()
        errors[kind] = {form: (value.double() - truth).abs().mean().item() for form, value in forms.items()}
    return errors
