"""The exact-zero task: one Gaussian, a linear denoiser, a linear energy; the optimal policy is known in closed form.

With x ~ N(m, v I) and E(x) = b·x every kernel of the chain is linear, s_{k+1} = A_k s_k + B_k + sigma_k eps, so that
V(s_k)/alpha = g_k·s_k + h_k stays linear and the optimal kernel is the prior's, moved by the constant sigma_k² g_{k+1}.
On a fixed or forgotten start its residual log Z + Λ + E/alpha is zero on *every* trajectory, whoever drew it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tiltune.samplers.chain import SIGMA_ZERO, Chain
from tiltune.samplers.condition import Condition
from tiltune.samplers.prior import Prior


class LinearDenoiser:
    """output = slope_k · s_k + offset_k at the chain's labels; slope [K], offset [K, D], float64.

    Errors: ValueError for a label that is not one of the chain's steps.
    """

    def __init__(self, chain: Chain, slope: Tensor, offset: Tensor) -> None:
        self.labels = chain.timesteps
        # What a denoiser is fed is the scaled state.
        self.slope, self.offset = slope / chain.input_scale, offset

    def __call__(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        label = timestep.reshape(-1).cpu().double()
        distance, step = (label[:, None] - self.labels).abs().min(-1)
        if distance.max() > 1e-3:
            raise ValueError("the linear denoiser was asked for a timestep that its chain does not have.")
        return self.slope[step, None].to(state) * state + self.offset[step].to(state)


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """N(mean, variance I), seen through ``chain``, tilted by E(x) = slope·x at temperature ``alpha``.

    mean, slope: [D] float64. Every figure is the chain's own, not the ideal diffusion's.

    Errors: ValueError for a chain that clips (not linear) or whose last step belongs to the prior and draws noise, which no
    kernel can explain.
    """

    chain: Chain
    mean: Tensor
    slope: Tensor
    variance: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.chain.clip is not None:
            raise ValueError(f"{self.chain.name} clips x_hat, so its kernels are not linear; use clip_sample=False.")
        if bool((self.chain.sigma[~self._trained] >= SIGMA_ZERO).any()):
            raise ValueError(
                f"{self.chain.name} ends in a last step of the prior that draws noise: the residual then keeps that noise and is"
                " zero for no policy. Use a chain whose last row is noiseless or carries a ratio."
            )

    @cached_property
    def gain(self) -> Tensor:
        """[K]: E[x | s_k] = m + gain_k (s_k - signal_k m); 0 where s_k says nothing of x."""
        signal, noise = self.chain.signal[:-1], self.chain.noise[:-1]
        informed = signal != 0
        spread = torch.where(informed, signal**2 * self.variance + noise**2, 1.0)
        return torch.where(informed, signal * self.variance / spread, 0.0)

    @cached_property
    def output(self) -> tuple[Tensor, Tensor]:
        """(slope [K], offset [K, D]) of the exact denoiser: out = (E[x | s] - p s) / q."""
        free = 1 - self.gain * self.chain.signal[:-1]
        return (self.gain - self.chain.p) / self.chain.q, (free / self.chain.q)[:, None] * self.mean

    @cached_property
    def kernel(self) -> tuple[Tensor, Tensor]:
        """(A [K], B [K, D]): the prior's kernel mean A_k s_k + B_k."""
        chain, (slope, offset) = self.chain, self.output
        on_output = chain.d * chain.q + chain.e
        return chain.c + chain.d * chain.p + on_output * slope, on_output[:, None] * offset

    @cached_property
    def soft_value(self) -> tuple[Tensor, Tensor]:
        """(g [K + 1, D], h [K + 1]) with V(s_k)/alpha = g_k·s_k + h_k, backward from g_K = -b/alpha, h_K = 0.

        log E exp(g·(A s + B + sigma eps) + h) gives g_k = A_k g_{k+1}, h_k = h_{k+1} + g_{k+1}·B_k + ½ sigma_k² |g_{k+1}|².
        """
        factor, shift = self.kernel
        g, h = [-self.slope / self.alpha], [torch.zeros((), dtype=torch.float64)]
        for k in reversed(range(self.chain.num_steps)):
            h.append(h[-1] + g[-1] @ shift[k] + 0.5 * self._variances[k] * (g[-1] @ g[-1]))
            g.append(factor[k] * g[-1])
        return torch.stack(g[::-1]), torch.stack(h[::-1])

    @cached_property
    def _variances(self) -> Tensor:
        """sigma² [K], 0 for a step that belongs to the prior."""
        return torch.where(self._trained, self.chain.sigma**2, 0.0)

    @property
    def _trained(self) -> Tensor:
        """[K] bool."""
        return torch.tensor([k in self.chain.trained for k in range(self.chain.num_steps)])

    @cached_property
    def log_z(self) -> float:
        """log E_prior[exp(-E/alpha)] of the chain, nats: V(s_0)/alpha averaged over s_0 ~ N(0, start_std² I)."""
        g, h = self.soft_value
        return (h[0] + 0.5 * self.chain.start_std**2 * (g[0] @ g[0])).item()

    @cached_property
    def start_spread(self) -> float:
        """Standard deviation of V(s_0)/alpha over starts, nats: what no constant log Z can fit. 0 on a forgotten start."""
        return self.chain.start_std * self.soft_value[0][0].norm().item()

    def energy(self, x: Tensor) -> Tensor:
        """b·x: [N, D] → [N]."""
        return x @ self.slope.to(x)

    def prior(self) -> Prior:
        """The chain with the exact denoiser of its Gaussian."""
        return Prior(LinearDenoiser(self.chain, *self.output), self.chain, tuple(self.mean.shape))

    def policy(self) -> LinearDenoiser:
        """The optimal policy: the prior's kernel mean moved by sigma_k² ∇V_{k+1}/alpha."""
        slope, offset = self.output
        on_output = self.chain.d * self.chain.q + self.chain.e
        move = self._variances[:, None] * self.soft_value[0][1:]
        return LinearDenoiser(self.chain, slope, offset + move / on_output[:, None])
