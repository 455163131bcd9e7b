"""Trajectories forward along the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .chain import Chain
from .condition import Condition
from .denoiser import Denoiser, evaluate_in_parts
from .prior import Prior
from .shapes import States
from .trajectory import Trajectories

Drawing = Literal["policy", "prior"]


class Step(NamedTuple):
    """following: the next state. log_ratio: nats, None where the step is not trained or there is no policy. prior_output: of the
    prior's network."""

    following: States
    log_ratio: Float[Tensor, " n"] | None
    prior_output: States


@torch.no_grad()
def step(
    prior: Prior,
    policy: Denoiser | None,
    state: States,
    k: int,
    noise: States | None,
    condition: Condition | None = None,
    *,
    drawn_by: Drawing = "policy",
) -> Step:
    """Denoising step k: s_{k+1} from s_k and standard noise, and log policy - log prior of it.

    noise: as `step_noise` draws it, None at a step without noise. condition: of each state, None without conditions.
    The prior takes the steps that are not trained, and all of them where ``policy`` is None or drawn_by is 'prior'.
    """
    chain, kernel = prior.chain, prior.chain.kernel
    prior_output = evaluate_in_parts(prior.denoiser, chain, state, k, condition)
    if policy is None or k not in chain.trained:
        drawn = kernel.mean(state, k, prior_output) if noise is None else kernel.sample(state, k, prior_output, noise)
        return Step(drawn, None, prior_output)
    assert noise is not None
    policy_output = evaluate_in_parts(policy, chain, state, k, condition)
    shift = kernel.shift(state, k, policy_output, prior_output)
    if drawn_by == "prior":
        return Step(kernel.sample(state, k, prior_output, noise), kernel.log_ratio_from_states(noise, shift), prior_output)
    return Step(kernel.sample(state, k, policy_output, noise), kernel.log_ratio_from_noise(noise, shift), prior_output)


@torch.no_grad()
def rollout(
    prior: Prior,
    policy: Denoiser | None,
    batch: int,
    generator: torch.Generator,
    *,
    drawn_by: Drawing = "policy",
    start: Float[Tensor, " {batch} *state"] | None = None,
    condition: Condition | None = None,
    keep: bool = True,
    keep_outputs: bool = False,
    noise: Callable[[int, States], States | None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Trajectories:
    """Draw ``batch`` trajectories from the policy, or from the prior where ``policy`` is None.

    drawn_by: 'prior' gives the policy's log-ratio on the *prior's* own trajectories; the policy draws nothing.
    start: fixed starts, whose dtype is that of the trajectories; drawn where None.
    condition: of each trajectory; those of the prior in turn where None.
    keep: False keeps only the terminal samples, as the one state of each trajectory.
    keep_outputs: also keep what the prior's network says at trained steps, which takes as much memory as the states.
    noise: (k, state) → what is drawn at step k, in place of `step_noise`; the density of it is the caller's to know.
    on_step: called before every step; what it raises ends the rollout.

    Returns trajectories with ``log_behavior`` and, with a policy, ``step_log_ratio`` set. No gradient is kept.
    """
    chain = prior.chain
    state = draw_start(prior, batch, generator) if start is None else start.to(prior.device)
    condition = prior.condition(batch) if condition is None else condition
    # Written in place: a list of states and their stack would hold every trajectory twice.
    states = state.new_empty((chain.num_steps + 1 if keep else 1, *state.shape))
    states[0] = state
    ratios: list[Tensor] = []
    outputs: list[Tensor] = []
    for k in range(chain.num_steps):
        if on_step is not None:
            on_step()
        drawn = step_noise(chain, k, state, generator) if noise is None else noise(k, state)
        state, ratio, prior_output = step(prior, policy, state, k, drawn, condition, drawn_by=drawn_by)
        if keep_outputs and k in chain.trained:
            outputs.append(prior_output)
        if ratio is not None:
            ratios.append(ratio)
        if keep:
            states[k + 1] = state
    states[-1] = state
    log_ratio = torch.stack(ratios) if ratios else None
    behavior = log_ratio.sum(0) if log_ratio is not None and drawn_by == "policy" else state.new_zeros(len(state))
    return Trajectories(
        states=states,
        step_log_ratio=log_ratio,
        log_behavior=behavior,
        condition=condition,
        prior_outputs=torch.stack(outputs) if outputs else None,
    )


def draw_start(
    prior: Prior, batch: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " {batch} *state"]:
    """Starts s_0 ~ N(0, start_std²), the same for policy and prior."""
    return prior.chain.start_std * torch.randn((batch, *prior.shape), generator=generator, device=prior.device, dtype=dtype)


def step_noise(chain: Chain, k: int, state: States, generator: torch.Generator) -> States | None:
    """Standard noise of the shape of ``state`` for step k; None at a step that draws none."""
    if chain.noiseless(k):
        return None
    return torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)


@torch.no_grad()
def denoise(
    prior: Prior,
    denoiser: Denoiser,
    state: States,
    generator: torch.Generator,
    condition: Condition | None = None,
    *,
    first: int = 0,
) -> Iterator[States]:
    """The states that follow s_first, step by step to the sample: a rollout without log-ratios, one network a step.

    ``denoiser`` takes the trained steps, the prior's network the others. condition: as in `rollout`.
    """
    chain = prior.chain
    condition = prior.condition(len(state)) if condition is None else condition
    for k in range(first, chain.num_steps):
        noise = step_noise(chain, k, state, generator)
        output = evaluate_in_parts(denoiser if k in chain.trained else prior.denoiser, chain, state, k, condition)
        state = chain.kernel.mean(state, k, output) if noise is None else chain.kernel.sample(state, k, output, noise)
        yield state


def prior_last_states(
    prior: Prior, state: States, generator: torch.Generator, condition: Condition | None = None
) -> list[States]:
    """The states that follow the last trained step's, by the prior; the last is the sample. Empty without such steps."""
    first = prior.chain.last_trained + 1
    return list(denoise(prior, prior.denoiser, state, generator, condition, first=first))


def in_parts(count: int, steps: int, on_progress: Callable[[int], None] | None) -> Callable[[], None]:
    """What to call with every one of ``steps`` steps, so that ``on_progress`` receives ``count`` in all."""
    taken = iter(range(steps))

    def step() -> None:
        if on_progress is not None:
            k = next(taken)
            on_progress(count * (k + 1) // steps - count * k // steps)

    return step
