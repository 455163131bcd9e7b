"""The soft value as teacher: its gradient, as the shift that the policy's kernels are to learn.

The tilted path law's own kernels move the prior's mean by (Stein's identity, h the ratio of tilted to prior density)

    delta_k(s_k) = E_tilted[z_k | s_k] = sigma_k E_tilted[grad log h_{k+1}(s_{k+1}) | s_k]

exactly. So sigma_k grad log h_{k+1} at the next state of a tilted path is a target for the policy's shift, without the noise z;
at a next state that another kernel q drew it is one with the weight h_{k+1}(s_{k+1}) / h_k(s_k) · prior / q, which is cut at
`HEAVIEST`. log h is a function of x_hat (`SoftValue`), and its gradient goes back through the prior's network. It varies from
next state to next state, and a policy that learns its mean at each state learns delta. At the kernel's mean alone it would learn
the gradient at one point, which is larger.

log h is mixed from two estimates (`calibrate`). Halfway, what the policy's own shift is worth is measured on held-out paths, and
the targets are multiplied by that (`rescale`): where log h is wrong, in size or altogether, it is learned less or not at all.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...samplers.condition import Condition
from ...samplers.denoiser import estimated_data, evaluate
from ...samplers.prior import Prior
from ...samplers.shapes import Index, States
from ...samplers.typed import backward, floats
from ..populations.held_out import HeldOut
from ..populations.population import Population
from .both_laws import BothLaws
from .calibration import Calibration
from .gradients import MAX_CHUNK, Gather, NoSync, Scale
from .soft_value import SoftValue
from .trust import Trust

RESCALED_AT = 0.5  # share of the warm start after which the policy's own shift says what the targets are worth
RESCALED, MOST = 0.6, 3.0  # the factor from that: Gaussian around 1, with this spread before it is measured; its largest value
HEAVIEST = 4.0  # of the weights of next states that another law drew; beyond it a few of them would be all that is learned from
EASED, EVEN_FROM = 0.8, 0.7  # power to which narrow kernels count less at first; share of the warm start where all count in nats


def refuse_without_gradient(prior: Prior) -> None:
    """Errors: ValueError for a prior whose output has no gradient by the state. x_hat has one even so, which is then wrong."""
    chain = prior.chain
    state = torch.zeros(1, *prior.shape, device=prior.device, requires_grad=True)
    step = torch.full((1,), chain.trained[0], device=prior.device)
    with torch.enable_grad():
        if not evaluate(prior.denoiser, chain, state, step, prior.condition(1)).requires_grad:
            raise ValueError(
                "warm_start value_drift takes a gradient through the prior's network, and this one's output has none: it runs"
                " under torch.no_grad, or outside of torch. Let it build a graph, or take --warm-start tlm."
            )


class ValueDrift:
    """Targets for the policy's shift, and the gradient of learning them.

    no_sync: goes around a forward and backward of the policy that another one will follow. chunk: rows at once.
    calibration: of log h. scale: of the targets (`rescale`). trust: how far updates may go. laws: whose steps are learned from.
    """

    def __init__(
        self,
        prior: Prior,
        population: Population,
        soft_value: SoftValue,
        calibration: Calibration,
        alpha: float,
        generator: torch.Generator,
        no_sync: NoSync = nullcontext,
    ) -> None:
        self.no_sync, self.chunk = no_sync, MAX_CHUNK
        self.prior, self.soft_value, self.calibration = prior, soft_value, calibration
        self.alpha, self.generator = alpha * soft_value.times, generator
        self.scale, self.trust = 1.0, Trust()
        self.learn_from(population)
        self._moves = prior.chain.sensitivity.float().to(prior.device)

    def learn_from(self, population: Population) -> None:
        """Its tilted paths are the ones to learn from. The policy's own are to be drawn anew (`BothLaws.renew`)."""
        self.laws = BothLaws(self.prior, population, self.alpha, self.generator)

    def state_dict(self) -> dict[str, Any]:
        parts = {"trust": self.trust.state_dict(), "laws": self.laws.state_dict()}
        return {"calibration": self.calibration._asdict(), "scale": self.scale, **parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale = state_dict["scale"]
        self.trust.load_state_dict(state_dict["trust"])
        self.laws.load_state_dict(state_dict["laws"])

    def _log_h(self, data: States, step: Index, group: Index, times: float = 1.0) -> Float[Tensor, " n"]:
        """Nats, with a graph, at the temperature that was learned at; at one lower by ``times``, up to a constant of the step."""
        estimates = self.soft_value.estimates(data, step, None, times, group)
        return (self.calibration.factor[step] * estimates).sum(1) - self.calibration.offset[step, group]

    def target(
        self,
        state: States,
        following: States,
        step: Index,
        prior_output: States,
        condition: Condition | None,
        tilted: Bool[Tensor, " n"],
        log_ratio: Float[Tensor, " n"] | None = None,
        times: float | None = None,
    ) -> States:
        """A shift whose mean over next states is to be learned at ``state``, as far as a clipped x_hat can follow.

        following: next states, of the tilted law where ``tilted`` is true, else of the prior, or of a kernel with this
        ``log_ratio`` to it there, nats. times: the temperature that was learned at over the one of the target; the run's own
        where None.
        """
        chain, network = self.prior.chain, self.prior.denoiser
        times = self.soft_value.times if times is None else times
        group = torch.zeros_like(step) if condition is None else condition.group
        with torch.enable_grad():
            after = following.detach().requires_grad_(True)
            data = estimated_data(network, chain, after, step + 1, condition)
            colder = self._log_h(data, step + 1, group, times)
            shift = torch.autograd.grad(colder.sum(), after)[0] * chain.kernel.std(step, state)
        with torch.no_grad():
            ahead = colder if times == 1.0 else self._log_h(data, step + 1, group)
            here = self._log_h(chain.kernel.clean(state, step, prior_output), step, group)
            drawn = ahead - here if log_ratio is None else ahead - here - log_ratio
            weight = torch.where(tilted, torch.ones_like(here), drawn.clamp(max=math.log(HEAVIEST)).exp())
            shift = self.scale * weight.view(-1, *[1] * (state.ndim - 1)) * shift
            return chain.kernel.reachable(state, step, prior_output, shift)

    @torch.no_grad()
    def rescale(self, policy: nn.Module, held_out: HeldOut, gather: Gather) -> None:
        """Multiply the targets by c with E<delta_policy, z> = c E<delta_policy, delta_target>, on the held-out paths.

        Where the policy has learned a part of the target only, c is what that part is worth; where it has not yet learned as much
        as it will, both sides are smaller alike. The target here is that of the paths' own temperature, which z is of, at next
        states that the prior draws anew: what the path drew is in z. c is shrunk toward 1 by as much as so many paths leave open.
        gather: one row a process.
        """
        self.scale = 1.0

        def claimed(state: States, step: Index, prior_output: States, condition: Condition | None) -> States:
            noise = torch.randn(state.shape, generator=self.generator, device=state.device, dtype=state.dtype)
            following = self.prior.chain.kernel.sample(state, step, prior_output, noise)
            of_prior = torch.zeros_like(step, dtype=torch.bool)
            return self.target(state, following, step, prior_output, condition, of_prior, times=self.alpha / held_out.alpha)

        along, _, asked = held_out.moments(policy, claimed)
        weight = held_out.weight
        drawn, expected = (weight * along).sum(), (weight * asked).sum()
        error = (weight * (along - drawn / expected * asked)).square().sum()
        every = gather(torch.stack([drawn, expected, error])[None])
        mean_drawn, mean_expected, variance = floats(every.mean(0) / torch.tensor([1, 1, len(every)]).to(every))
        if 0 < variance < math.inf:  # false for one path alone, and for what is no number
            doubt = variance * RESCALED**-2
            c = (mean_drawn * mean_expected + doubt) / (mean_expected**2 + doubt)
            self.scale = min(max(c, 0.0), MOST)
        self.trust.rescale(self.scale)

    def eased(self, progress: float) -> Float[Tensor, " kernels"]:
        """What each trained step's miss counts at ``progress`` (0 to 1) of a warm start: 1 in its last part.

        Kernels that an output moves more than the median's count less at first. Their curvature otherwise sets the pace of all,
        since one network serves all steps; it also makes them quick to come back to their place once they count in full.
        """
        power = 2 * EASED * max(0.0, 1 - progress / EVEN_FROM)
        return (self._moves / self._moves.median()).clamp(min=1.0) ** -power

    def backward(self, policy: nn.Module, count: int, scale: Scale, progress: float = 1.0) -> Float[Tensor, ""]:
        """Accumulate the gradient of sum_k E ½ |delta_policy - target|² on ``count`` steps of both laws (`BothLaws`).

        Returns the loss, nats but for `eased`, scaled. ``scale``: that of a gradient scaler.
        """
        eased, chain = self.eased(progress), self.prior.chain
        drawn = self.laws.draw(count)
        sides = torch.zeros(2, dtype=torch.float64, device=drawn.state.device)
        parts = drawn.split(self.chunk)
        for part in parts:
            state, following, at, condition, tilted, log_ratio, weight = part
            with torch.no_grad():
                prior_output = evaluate(self.prior.denoiser, chain, state, at, condition)
            target = self.target(state, following, at, prior_output, condition, tilted, log_ratio)
            with nullcontext() if part is parts[-1] else self.no_sync():
                output = evaluate(policy, chain, state, at, condition)
                miss = chain.kernel.shift(state, at, output, prior_output, straight=True) - target
                share = eased[chain.row_of_step(at)] * weight
                asked, missed = (0.5 * share * side.flatten(1).square().sum(1) for side in (target, miss))
                backward(scale(missed.sum()))
            sides += torch.stack([asked, missed.detach()]).double().sum(1)
        self.trust.observe(*floats(sides))
        return scale(sides[1].float())
