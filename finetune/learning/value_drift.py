"""The soft value as teacher: its gradient, as the shift that the policy's kernels are to learn.

The tilted path law's own kernels move by delta_k = sigma_k grad log h_{k+1}(mu_prior) where log h is linear at the scale of
sigma_k. So a learned log h gives a target for the policy's shift that has no sampling noise. Two estimates of log h (`SoftValue`)
give two gradients. What each is worth at each step is measured: on tilted paths of the population, with the noise z that the
prior drew there, and by networks that have not seen the path,

    KL(tilted || policy) = KL(tilted || prior) - sum_k E[<delta, z> - ½ |delta|²]

is quadratic in the factors of the gradients. So an estimate of log h that is wrong, in size or altogether, is learned less or
not at all.

A policy learns what its targets have in common and leaves out what changes from state to state for no reason. So halfway, what is
left of the targets is measured once more, on the policy's own shift (`rescale`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...samplers.condition import Condition, selected
from ...samplers.denoiser import evaluate
from ...samplers.prior import Prior
from ...samplers.shapes import Index, States
from ...samplers.trajectory import rows_at_once
from ...samplers.typed import backward, floats, solve, unique_with_counts
from ..populations.held_out import HeldOut
from ..populations.population import Population
from .gradients import MAX_CHUNK, Gather, NoSync, Scale
from .rows import step_share, stratified
from .soft_value import SoftValue, importance_weight

PATHS = 600  # tilted paths on which the factors are measured
EXPECTED, SPREAD = 0.4, 0.3  # of each gradient's factor before anything is measured: Gaussian, per step too (around 1)
LARGEST = 1.5  # factor of one step over that of all
RESCALED_AT = 0.5  # share of the warm start after which the policy's own shift says what the targets are worth
RESCALED, MOST = 0.6, 3.0  # the factor from that: Gaussian around 1, with this spread before it is measured; its largest value
SHRUNK, GROWN = 0.9, 1.02  # an update's bound, after one by which the policy is further from its targets than the prior, or not
RECENT = 0.9  # decay of the averages that tell
EASED, EVEN_FROM = 0.8, 0.7  # power to which narrow kernels count less at first; share of the warm start where all count in nats


class ValueDrift:
    """Targets for the policy's shift, and the gradient of learning them.

    no_sync: goes around a forward and backward of the policy that another one will follow. chunk: rows at once.
    trust: share of an update's bound in nats that the noise of its gradient leaves.
    factor: of the two gradients at each trained step; scale: of their sum (`rescale`). explained: nats of
    KL(tilted || prior) that the target takes away before it is rescaled, at the temperature that was learned at, estimated on
    the paths that the factors were fitted to.
    """

    def __init__(
        self,
        prior: Prior,
        population: Population,
        soft_value: SoftValue,
        alpha: float,
        generator: torch.Generator,
        no_sync: NoSync = nullcontext,
    ) -> None:
        self.no_sync, self.chunk = no_sync, MAX_CHUNK
        self.prior, self.population, self.soft_value = prior, population, soft_value
        self.alpha, self.generator = alpha * soft_value.times, generator
        self.factor: Float[Tensor, " kernels 2"] = torch.full((prior.chain.num_kernels, 2), EXPECTED, device=prior.device)
        self.explained: float = 0.0
        self.scale, self.trust = 1.0, 1.0
        self._misses = torch.zeros(2, dtype=torch.float64, device=prior.device)
        self._mixture = 0.5 * (importance_weight(population, self.alpha) + importance_weight(population, math.inf))
        self._moves = prior.chain.sensitivity.float().to(prior.device)
        self._probability = step_share(prior.chain).to(prior.device)

    def state_dict(self) -> dict[str, Any]:
        learned = {"factor": self.factor, "explained": self.explained, "scale": self.scale}
        return {**learned, "trust": self.trust, "misses": self._misses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.factor, self.explained, self.scale = (
            state_dict["factor"].to(self.factor),
            state_dict["explained"],
            state_dict["scale"],
        )
        self.trust, self._misses = state_dict["trust"], state_dict["misses"].to(self._misses)

    def _gradients(self, mean: States, step: Index, path: Index) -> Float[Tensor, " 2 n *state"]:
        """sigma_k grad log h_{k+1} at the kernels' means, by both estimates, each path by the network new to it."""
        group = self.population.trajectories.group[path]
        with torch.enable_grad():
            state = mean.detach().requires_grad_(True)
            values = self.soft_value.estimates(state, step + 1, path, 1.0, group).sum(0)
            gradients = [torch.autograd.grad(value, state, retain_graph=True)[0] for value in values]
        return torch.stack(gradients) * self.prior.chain.kernel.std(step, mean)

    @torch.no_grad()
    def measure(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Set the factors from tilted paths, each judged by the network that has not seen it.

        Gaussian regression in two stages: one pair of factors for all steps, then one factor a step around it. Both shrink toward
        what is expected by as much as so many effective paths leave open.
        """
        chain, states = self.prior.chain, self.population.trajectories.states
        path, times = unique_with_counts(self.population.draw(PATHS, self.alpha, self.generator))
        times = times.double() / times.sum()
        effective = 1 / times.square().sum()
        kernels = chain.num_kernels
        drawn = torch.zeros(kernels, 2, dtype=torch.float64, device=states.device)
        own = torch.zeros(kernels, 2, 2, dtype=torch.float64, device=states.device)
        rows = rows_at_once(self.prior.shape, self.prior.device)
        for row, k in enumerate(chain.trained):
            for some, weight in zip(torch.split(path, rows), torch.split(times, rows), strict=True):
                state, step = states[k, some], torch.full_like(some, k)
                output = evaluate(self.prior.denoiser, chain, state, step, selected(self.population.trajectories.condition, some))
                z = chain.kernel.standardize(states[k + 1, some], state, step, output)
                shift = self._gradients(chain.kernel.mean(state, step, output), step, some).flatten(2).double()
                drawn[row] += torch.einsum("ind,nd,n->i", shift, z.flatten(1).double(), weight)
                own[row] += torch.einsum("ind,jnd,n->ij", shift, shift, weight)
            if on_progress:
                on_progress(1)
        expected = torch.full((2,), EXPECTED, dtype=torch.float64, device=states.device)
        certainty = torch.eye(2, dtype=torch.float64, device=states.device) / SPREAD**2
        together = effective * own.sum(0) + certainty
        pair = solve(together, effective * drawn.sum(0) + certainty @ expected)
        along, size = drawn @ pair, torch.einsum("kij,i,j->k", own, pair, pair)
        a_step = ((effective * along + SPREAD**-2) / (effective * size + SPREAD**-2)).clamp(0.0, LARGEST)
        self.factor = (a_step[:, None] * pair).float()
        self.explained = (a_step * along - 0.5 * a_step.square() * size).sum().item()

    @torch.no_grad()
    def target(self, state: States, step: Index, prior_output: States, condition: Condition | None = None) -> States:
        """The shift to learn at states of any path, as far as a clipped x_hat can follow."""
        return self._shift(state, step, prior_output, condition, self.soft_value.times, self.scale)

    def _shift(
        self,
        state: States,
        step: Index,
        prior_output: States,
        condition: Condition | None,
        times: float,
        scale: float,
    ) -> States:
        """The same, at a temperature lower by ``times`` than the one that was learned at."""
        chain = self.prior.chain
        group = None if condition is None else condition.group
        with torch.enable_grad():
            mean = chain.kernel.mean(state, step, prior_output).detach().requires_grad_(True)
            factor = self.factor[chain.row_of_step(step)]
            value = (scale * factor * self.soft_value.estimates(mean, step + 1, None, times, group)).sum()
            shift = torch.autograd.grad(value, mean)[0] * chain.kernel.std(step, mean)
        return chain.kernel.reachable(state, step, prior_output, shift)

    @torch.no_grad()
    def rescale(self, policy: nn.Module, held_out: HeldOut, gather: Gather) -> None:
        """Multiply the targets by c with E<delta_policy, z> = c E<delta_policy, delta_target>, on the held-out paths.

        Where the policy has learned a part of the target only, c is what that part is worth; where it has not yet learned as much
        as it will, both sides are smaller alike. The target here is that of the paths' own temperature, which z is of. c is
        shrunk toward 1 by as much as so many paths leave open. gather: one row a process.
        """

        def claimed(state: States, step: Index, prior_output: States, condition: Condition | None) -> States:
            return self._shift(state, step, prior_output, condition, self.alpha / held_out.alpha, 1.0)

        along, _, asked = held_out.moments(policy, claimed)
        weight = held_out.weight
        drawn, expected = (weight * along).sum(), (weight * asked).sum()
        error = (weight * (along - drawn / expected * asked)).square().sum()
        every = gather(torch.stack([drawn, expected, error])[None])
        mean_drawn, mean_expected, variance = floats(every.mean(0) / torch.tensor([1, 1, len(every)]).to(every))
        self.scale = 1.0
        if 0 < variance < math.inf:  # false for one path alone, and for what is no number
            doubt = variance * RESCALED**-2
            c = (mean_drawn * mean_expected + doubt) / (mean_expected**2 + doubt)
            self.scale = min(max(c, 0.0), MOST)

    def eased(self, progress: float) -> Float[Tensor, " kernels"]:
        """What each trained step's miss counts at ``progress`` (0 to 1) of a warm start: 1 in its last part.

        Kernels that an output moves more than the median's count less at first. Their curvature otherwise sets the pace of all,
        since one network serves all steps; it also makes them quick to come back to their place once they count in full.
        """
        power = 2 * EASED * max(0.0, 1 - progress / EVEN_FROM)
        return (self._moves / self._moves.median()).clamp(min=1.0) ** -power

    def backward(self, policy: nn.Module, count: int, scale: Scale, progress: float = 1.0) -> Float[Tensor, ""]:
        """Accumulate the gradient of sum_k E ½ |delta_policy - target|² on ``count`` stored rows of prior and tilted paths.

        Returns the loss, nats but for `eased`, scaled. ``scale``: that of a gradient scaler.
        """
        eased = self.eased(progress)
        chain, states = self.prior.chain, self.population.trajectories.states
        row = stratified(self._probability, count, self.generator)
        path = torch.multinomial(self._mixture, count, replacement=True, generator=self.generator)
        state = states[chain.step_of_row(row), path]
        total = torch.zeros((), device=states.device)
        misses = torch.zeros_like(self._misses)
        parts = list(zip(*(torch.split(rows, self.chunk) for rows in (state, row, path)), strict=True))
        for some, of, paths in parts:
            at, condition = chain.step_of_row(of), selected(self.population.trajectories.condition, paths)
            with torch.no_grad():
                prior_output = evaluate(self.prior.denoiser, chain, some, at, condition)
            target = self.target(some, at, prior_output, condition)
            with nullcontext() if some is parts[-1][0] else self.no_sync():
                output = evaluate(policy, chain, some, at, condition)
                miss = chain.kernel.shift(some, at, output, prior_output, straight=True) - target
                share = eased[of] / (count * self._probability[of])
                missed, asked = (0.5 * share * side.flatten(1).square().sum(1) for side in (miss, target))
                loss = scale(missed.sum())
                backward(loss)
            total += loss.detach()
            misses += torch.stack([missed.detach(), asked]).double().sum(1)
        self._believe(misses)
        return total

    def _believe(self, misses: Float[Tensor, " 2"]) -> None:
        """Set ``trust`` by the losses of policy and prior on the same rows [2].

        An update that is too long for the noise of its gradient leaves the policy further from its targets than the prior is.
        """
        self._misses = RECENT * self._misses + (1 - RECENT) * misses
        policy, prior = floats(self._misses)
        self.trust = self.trust * SHRUNK if policy > prior else min(1.0, self.trust * GROWN)
