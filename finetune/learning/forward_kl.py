"""The forward KL to the tilted path law, on rows of the population: the warm start, and a part of every update where asked for.

    row      one step k of one path: s_k, and s_{k+1} or the mean of s_{k+1} given the path's end
    plain    -l_k, the trajectory likelihood, on paths drawn by exp(-E/alpha)
    controlled   with a soft value, which takes out most of the noise: docs/theory.md

The log-ratio is linear in s_{k+1}, so that c s_k + d x for the path's end x (`Bridge.mean`) puts its mean in its place. Where
the chain does not allow it (`forgets_given_next`), or the prior's network is too far from an exact denoiser
(`bridge_bias`), the stored next state itself is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ...samplers.bridge import bridge_of, forgets_given_next
from ...samplers.condition import Condition, selected
from ...samplers.denoiser import evaluate, evaluate_in_parts
from ...samplers.prior import Prior
from ...samplers.shapes import Index, States
from ...samplers.trajectory import rows_at_once
from ..config.train import TrainConfig
from ..populations.population import Population
from .bridge_check import bridge_bias
from .gradients import NoSync, Scale, backward_likelihood, backward_rows, chunk_rows
from .rows import states_of, stratified
from .soft_value import SoftValue, importance_weight

SLOPE_PATHS = 1500
FRESH = 0.7  # share of the states of controlled rows that are noised anew from a path's end
UNBIASED = 0.1  # nats that bridged next states may move a policy at E = 0


class ForwardKL:
    """Gradients of KL(tilted || policy) on the population's paths.

    no_sync: goes around a forward and backward of the policy that another one will follow, before its gradients are used.
    slope, by trained step: the share of a bridged shift that controlled rows learn; ones until `measure_slope`.
    alpha: the temperature whose tilted paths plain rows are of: the target's, or a higher one on the way there.
    bridged: whether plain rows take the mean of s_{k+1} given the path's end; until `check_bridge`, wherever the chain allows it.
    fresh: the share of bridged states that are noised anew from the path's end.
    """

    def __init__(
        self,
        prior: Prior,
        policy: nn.Module,
        population: Population,
        soft_value: SoftValue | None,
        config: TrainConfig,
        generator: torch.Generator,
        no_sync: NoSync = nullcontext,
    ) -> None:
        self.prior, self.policy, self.population, self.soft_value = prior, policy, population, soft_value
        self.config, self.generator, self.no_sync = config, generator, no_sync
        self.alpha = config.alpha
        self.slope = torch.ones(prior.chain.num_kernels, device=population.trajectories.states.device)
        # Only then may a path's end stand in for its next state at all.
        self.bridge = bridge_of(prior.chain) if forgets_given_next(prior.chain) else None
        self.bridged, self.fresh = self.bridge is not None, 0.0

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        measured = {"slope": self.slope, "bridged": self.bridged, "step_probability": self.__dict__.get("_step_probability")}
        return {**measured, "fresh": self.fresh, "alpha": self.alpha}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slope, self.bridged = state_dict["slope"].to(self.slope), state_dict["bridged"]
        self.fresh, self.alpha = state_dict["fresh"], state_dict["alpha"]
        if state_dict["step_probability"] is not None:
            self._step_probability = state_dict["step_probability"].to(self.slope)

    @property
    def bridged_and_controlled(self) -> bool:
        """Whether `measure_slope` has something to correct."""
        return self.soft_value is not None and self.bridge is not None

    def backward(self, count: int, scale: Scale, factor: float = 1.0) -> Float[Tensor, ""]:
        """Accumulate ``factor`` times the gradient, on ``count`` rows; returns the loss, scaled."""
        if self.soft_value is not None:
            return self._controlled(self.soft_value, count, scale, factor)
        row = stratified(self._step_probability, count, self.generator)
        step = self.prior.chain.step_of_row(row)
        state, following, condition = self.rows(step)
        g = scale(-factor / (count * self._step_probability[row]))
        chunk = self._chunk
        losses: list[Tensor] = []
        for first in range(0, count, chunk):
            some = slice(first, first + chunk)
            own = selected(condition, some)
            with self.no_sync() if first + chunk < count else nullcontext():
                losses.append(
                    backward_rows(self.policy, self.prior.chain, state[some], following[some], step[some], g[some], own)
                )
        return torch.stack(losses).sum()

    def rows(self, step: Index) -> tuple[States, States, Condition | None]:
        """(s_k, s_{k+1} or its mean given the path's end, condition) of tilted prior paths at ``step``.

        Where they may be, bridged states are noised anew from the path's end, so that few paths are not learned by heart.
        """
        states = self.population.trajectories.states
        index = self.population.draw(len(step), self.alpha, self.generator)
        condition = self._condition(index)
        if not self.bridged:
            return states[step, index], states[step + 1, index], condition
        assert self.bridge is not None
        state = states_of(self.prior.chain, states, index, step, self.fresh, self.generator)
        return state, self.bridge.mean(state, states[-1, index], step), condition

    def _condition(self, path: Index) -> Condition | None:
        return selected(self.population.trajectories.condition, path)

    def check_bridge(self, agreed: Callable[[float], float]) -> float:
        """Use bridged next states, and fresh states before them, only where the population's paths at E = 0 show that they may
        be; returns `bridge_bias` of what is used, or of stored states where nothing may be, nats.

        For plain rows. Controlled ones have w - h in place of w, which is 0 at E = 0, and their shift is measured
        (`measure_slope`). agreed: the mean over the processes.
        """
        nats = math.inf
        for self.fresh in (1.0, 0.0):
            nats = agreed(bridge_bias(self.prior, self.population.prior_paths, self.fresh, self.generator))
            self.bridged = nats < UNBIASED
            if self.bridged:
                break
        return nats

    @torch.no_grad()
    def measure_slope(self) -> None:
        """Set ``slope`` to the factor on the policy's shift delta that suits the tilted paths best: E<delta, z> / E|delta|².

        z is the noise that the prior's kernels did draw on these paths. A bridged shift promises more than that: the end of a
        path tells the mean of s_{k+1} exactly where the prior reverses its noising exactly, and K Gaussian kernels of a learned
        network do not. Noise in delta lowers the factor as well, as it should. Sums over three neighboring steps, as one alone is
        noisy; never above 1.
        """
        chain, states = self.prior.chain, self.population.trajectories.states
        drawn, own = torch.zeros(2, chain.num_kernels, device=states.device)
        path = self.population.draw(SLOPE_PATHS, self.config.alpha, self.generator)
        for row, k in enumerate(chain.trained):
            for some in torch.split(path, rows_at_once(self.prior.shape, self.prior.device)):
                state, step, condition = states[k, some], torch.full_like(some, k), self._condition(some)
                prior_output = evaluate(self.prior.denoiser, chain, state, step, condition)
                output = evaluate(self.policy, chain, state, step, condition)
                shift = chain.kernel.shift(state, step, output, prior_output)
                drawn[row] += (shift * chain.kernel.standardize(states[k + 1, some], state, step, prior_output)).sum()
                own[row] += shift.square().sum()
        around = torch.ones(1, 1, 3, device=states.device)
        above, below = (functional.conv1d(total[None, None], around, padding=1)[0, 0] for total in (drawn, own))
        self.slope = torch.where(below > 0, above / below, 1.0).clamp(0.0, 1.0)

    def _controlled(self, soft_value: SoftValue, count: int, scale: Scale, factor: float) -> Float[Tensor, ""]:
        """The gradient with the soft value as control variate, on paths of prior and tilted law alike.

        On the prior's paths E_prior[w <z, delta>] is what the likelihood needs, and w - h_k(s_k) may stand for w: in late steps,
        where the state has decided, the two are nearly equal and the noise is gone. Without it those steps, whose kernels are
        narrow, learn the noise of a few hundred effective paths by heart.
        """
        chain, states = self.prior.chain, self.population.trajectories.states
        weight, of_prior = (importance_weight(self.population, alpha) for alpha in (self.config.alpha, math.inf))
        mixture = 0.5 * (weight + of_prior)
        even = torch.full((chain.num_kernels,), 1 / chain.num_kernels, device=states.device)
        all_steps = chain.step_of_row(stratified(even, count, self.generator))
        all_paths = torch.multinomial(mixture, count, replacement=True, generator=self.generator)
        fresh = 0.0 if self.bridge is None else FRESH
        all_states = states_of(chain, states, all_paths, all_steps, fresh, self.generator)
        total = torch.zeros((), device=states.device)
        chunk = self._chunk
        parts = list(zip(*(torch.split(rows, chunk) for rows in (all_states, all_steps, all_paths)), strict=True))
        for part in parts:
            state, step, path = part
            condition = self._condition(path)
            with torch.no_grad():
                prior_output = evaluate(self.prior.denoiser, chain, state, step, condition)
            if self.bridge is not None:
                mean = chain.kernel.mean(state, step, prior_output)
                slope = self.slope[chain.row_of_step(step)].reshape(-1, *[1] * (state.ndim - 1))
                following = torch.lerp(mean, self.bridge.mean(state, states[-1, path], step), slope)
            else:
                following = states[step + 1, path]
            share = scale(factor * chain.num_kernels / (count * mixture[path]))
            data = chain.kernel.clean(state, step, prior_output)
            value = soft_value.of_paths(data, step, path, self.population.trajectories.group[path])
            control = share * of_prior[path] * value.exp()
            with nullcontext() if part is parts[-1] else self.no_sync():
                total += backward_likelihood(
                    self.policy, chain, prior_output, state, following, step, share * weight[path], control, condition
                )
        return total

    @cached_property
    def _chunk(self) -> int:
        """Rows of the population at once, so that their graph fits ``memory_mb``."""
        most = max(self.config.warm_start_rows, self.config.forward_rows)
        with self.no_sync():
            return chunk_rows(
                self.policy, self.prior.chain, self.population.trajectories, self.config.memory_mb, most, total=most
            )

    @cached_property
    def _step_probability(self) -> Float[Tensor, " kernels"]:
        """Half even, half by the root mean square of the prior's residual (x - x_hat) d / sigma."""
        chain = self.prior.chain
        per_step = 64
        step = chain.step_of_row(torch.arange(chain.num_kernels, device=self.prior.device)).repeat_interleave(per_step)
        with torch.no_grad():
            state, following, condition = self.rows(step)
            output = evaluate_in_parts(self.prior.denoiser, chain, state, step, condition)
            z = chain.kernel.standardize(following, state, step, output)
        residual = z.flatten(1).square().sum(1).reshape(-1, per_step).mean(1).sqrt()
        return 0.5 * residual / residual.sum() + 0.5 / chain.num_kernels
