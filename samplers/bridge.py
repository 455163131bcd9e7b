"""The chain noised back: states of a path that ends at a known clean sample x.

    s_{k+1} = c_k s_k + d_k x + tau_k eps,    tau_k² = noise_{k+1}² - c_k² noise_k²

keeps every s_k at its nominal law N(signal_k x, noise_k²), so that at E = 0 the likelihood of these trajectories leaves the prior
unchanged. Plain Markov noising is right only where c and tau are those of DDPM. The steps after the last trained one are no part
of it: the prior takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .chain import Chain
from .condition import Condition
from .prior import Prior
from .rollout import prior_last_states
from .shapes import Index, States
from .trajectory import Trajectories
from .typed import floats


@dataclass(frozen=True, eq=False)
class Bridge:
    """The coefficients above, float64, one for each step up to the last trained one."""

    c: Float[Tensor, " bridged"]
    d: Float[Tensor, " bridged"]
    tau: Float[Tensor, " bridged"]

    def mean(self, state: States, end: States, step: Index) -> States:
        """c s_k + d x: the mean of s_{k+1} given s_k and the path's end x."""
        c, d = (column.to(state)[step].reshape(-1, *[1] * (state.ndim - 1)) for column in (self.c, self.d))
        return c * state + d * end


def bridge_of(chain: Chain) -> Bridge:
    """The bridge of a chain.

    Errors: ValueError where the table's levels do not follow from one another (DDIM on 'linspace' spacing, say).
    """
    count = chain.last_trained + 1
    rows = slice(0, count)
    c = (chain.c - chain.e * chain.p / chain.q)[rows]
    d = (chain.d + chain.e / chain.q)[rows]
    following = slice(1, count + 1)
    misfit = (d - (chain.signal[following] - c * chain.signal[rows])).abs().max().item()
    variance = chain.noise[following] ** 2 - c**2 * chain.noise[rows] ** 2
    # What the last kernel before the steps of the prior lands on feeds no further kernel, so only its mean matters there.
    inner = variance[:-1] if chain.prior_last_steps else variance
    if not (misfit < 1e-4 and bool((inner > -1e-6).all())):
        raise ValueError(
            f"{chain.name}: cannot noise samples back along this chain: its steps do not lead from one nominal noise"
            f" level to the next (misfit {misfit:.2g}, smallest variance {variance.min().item():.2g}). DDIM does this on"
            " 'linspace' and some 'trailing' spacings: use 'leading', or a step count that divides the training"
            " steps, or train on rollouts only."
        )
    return Bridge(c, d, variance.clamp(min=0).sqrt())


def forgets_given_next(chain: Chain) -> bool:
    """Whether s_k tells nothing more of x once s_{k+1} is known: c_k noise_k² signal_{k+1} = signal_k noise_{k+1}².

    True for DDPM, DDIM with eta = 1 and the Brownian chain, false for a smaller eta and for the flow SDEs. Only then is
    c s_k + d x the mean of s_{k+1} for a state s_k and an end x of the *same* path. False also without a bridge.
    """
    try:
        c = bridge_of(chain).c
    except ValueError:
        return False
    here, following = slice(0, len(c)), slice(1, len(c) + 1)
    left = c * chain.noise[here] ** 2 * chain.signal[following]
    return bool((left - chain.signal[here] * chain.noise[following] ** 2).abs().max() < 1e-4 * chain.noise.max() ** 2)


@torch.no_grad()
def noise_back(
    prior: Prior, samples: Float[Tensor, " batch *state"], generator: torch.Generator, condition: Condition | None = None
) -> Trajectories:
    """Fresh trajectories that end at given samples: s_0 ~ N(a_0 x, b_0²), s_{k+1} = c s_k + d x + tau eps.

    Where the last steps belong to the prior the trajectory ends at what they make, not at the given sample, since that is the
    sample the chain would give: evaluate the energy there. Their behavior density is unknown (None). condition: of the samples,
    which a conditional prior needs.

    Errors: ValueError for a chain without a bridge.
    """
    chain, bridge = prior.chain, bridge_of(prior.chain)
    c, d, tau = floats(bridge.c), floats(bridge.d), floats(bridge.tau)

    def gaussian() -> Float[Tensor, " batch *state"]:
        return torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)

    if chain.start_std == 0.0:
        state = torch.zeros_like(samples)
    else:
        state = chain.signal[0].item() * samples + chain.noise[0].item() * gaussian()
    states = [state]
    for k in range(len(c)):
        state = c[k] * state + d[k] * samples
        if tau[k] > 0:
            state = state + tau[k] * gaussian()
        states.append(state)
    states += prior_last_states(prior, state, generator, condition)
    return Trajectories(states=torch.stack(states), condition=condition)
