"""The sampler as a table: one row a step, no scheduler copied.

    x_hat = p_k s_k + q_k out                                (what the network says the clean sample is)
    mu    = c_k s_k + d_k clip(x_hat) + e_k out
    s_k+1 = mu + sigma_k eps,    eps ~ N(0, I)

Step k runs along *sampling*: ``states[0]`` is the start, ``states[K]`` the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Below this a standard deviation is a clamp of the scheduler (DDPM's 1e-10), not a noise.
SIGMA_ZERO = 1e-6
FORGOTTEN = 0.01  # share of the end that the start explains, at most, where it counts as forgotten


class Row(NamedTuple):
    """Coefficients of one step, or of a batch of steps (each then has shape [N, 1, ...])."""

    p: Tensor | float
    q: Tensor | float
    c: Tensor | float
    d: Tensor | float
    e: Tensor | float
    sigma: Tensor | float
    input_scale: Tensor | float


@dataclass(frozen=True, eq=False)
class Chain:
    """A finite chain of Gaussian kernels around a denoising network.

    Every column is a float64 tensor of shape [K]; ``signal`` and ``noise`` are [K + 1] and mean
    s_k ≈ signal_k x + noise_k eps for a clean sample x (nan where the chain has no such level).

    ``decoder`` is the number of last rows that belong to the prior: policy and prior share them, they carry no
    log-ratio, and the tilted law is exact for the chain as it is run. ``clip`` is the bound of x_hat, or None.

    Errors: ValueError where a row is non-finite or an inner row has no noise, since a noiseless kernel has no density.
    """

    name: str
    timesteps: Tensor
    p: Tensor
    q: Tensor
    c: Tensor
    d: Tensor
    e: Tensor
    sigma: Tensor
    input_scale: Tensor
    signal: Tensor
    noise: Tensor
    start_std: float
    clip: float | None = None
    decoder: int = 0

    def __post_init__(self) -> None:
        for name in ("timesteps", *Row._fields, "signal", "noise"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu().double())
        for name in ("timesteps", *Row._fields):
            column = getattr(self, name)
            bad = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"{self.name}: column '{name}' is not finite at step {bad[0]} of {self.num_steps}; such a step has no"
                    " kernel. Zero-terminal-SNR betas and variance_type='fixed_large_log' do this: use an ordinary beta"
                    " schedule and variance_type 'fixed_large' or 'fixed_small'."
                )
        if not self.num_kernels:
            raise ValueError(
                f"{self.name}: the only step belongs to the prior as its decoder, so nothing is left to carry a log-ratio;"
                " take at least two steps."
            )
        quiet = (self.sigma[: self.num_kernels] < SIGMA_ZERO).nonzero().flatten().tolist()
        if quiet:
            raise ValueError(
                f"{self.name}: step {quiet[0]} of {self.num_steps} draws no noise (sigma < {SIGMA_ZERO:g}), so the log-ratio of"
                " policy and prior is undefined there. Use a stochastic sampler (DDIM with eta > 0, DDPM, Euler ancestral,"
                " a flow SDE); a noiseless *last* step is accepted with last_step='decoder' or an explicit sigma."
            )

    @property
    def num_steps(self) -> int:
        """K, the number of network evaluations a sample costs."""
        return len(self.timesteps)

    @property
    def num_kernels(self) -> int:
        """Rows that carry a log-ratio: all K but those of the decoder."""
        return self.num_steps - self.decoder

    @property
    def sensitivity(self) -> Tensor:
        """[num_kernels] by how many of its standard deviations a kernel's mean moves where the network's output moves by 1."""
        rows = slice(0, self.num_kernels)
        return ((self.d * self.q + self.e)[rows] / self.sigma[rows]).abs()

    @cached_property
    def _floats(self) -> list[Row]:
        columns = [getattr(self, name).tolist() for name in Row._fields]
        return [Row(*values) for values in zip(*columns, strict=True)]

    @cached_property
    def _unscaled(self) -> bool:
        return bool((self.input_scale == 1).all())

    @cached_property
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def _table(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._tables:
            columns = [getattr(self, name) for name in (*Row._fields, "timesteps")]
            self._tables[key] = torch.stack([*columns, self._growth]).to(like)
        return self._tables[key]

    @cached_property
    def _growth(self) -> Tensor:
        """[K]: what the mean takes of the state beyond s_k itself (with the state's share of x_hat, unless that is clipped)."""
        return self.c - 1 if self.clip is not None else self.c + self.d * self.p - 1

    def row(self, step: int | Tensor, like: Tensor) -> Row:
        """Coefficients at ``step``: floats for an int, tensors [N, 1, ...] shaped for ``like`` for a LongTensor [N]."""
        if isinstance(step, int):
            return self._floats[step]
        columns = self._table(like)[: len(Row._fields), step]
        return Row(*columns.reshape(len(Row._fields), -1, *[1] * (like.ndim - 1)))

    def timestep(self, step: int | Tensor, like: Tensor) -> Tensor:
        """The label a network is conditioned on, shape [] or [N]."""
        return self._table(like)[len(Row._fields), step]

    def network_input(self, state: Tensor, step: int | Tensor) -> Tensor:
        """What the network is fed: the state, divided by sqrt(sigma² + 1) for Euler ancestral."""
        return state if self._unscaled else state * self.row(step, state).input_scale

    def clean(self, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """x_hat, clipped where the scheduler clips; shape of ``state``."""
        return self._clean(self.row(step, state), state, output)

    def _clean(self, row: Row, state: Tensor, output: Tensor) -> Tensor:
        clean = row.p * state + row.q * output
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def mean(self, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """Mean of s_{k+1} given s_k and the network's output; shape of ``state``."""
        row = self.row(step, state)
        if self.clip is None:  # linear in both: two products instead of five
            return (row.c + row.d * row.p) * state + (row.d * row.q + row.e) * output
        return row.c * state + row.d * self._clean(row, state, output) + row.e * output

    def kernel_shift(
        self, state: Tensor, step: int | Tensor, policy_output: Tensor, prior_output: Tensor, *, straight: bool = False
    ) -> Tensor:
        """delta_k = (mu_policy - mu_prior) / sigma_k, from the difference of the outputs where x_hat is not clipped.

        The means themselves are never subtracted: at 16384 dimensions and 1000 steps that costs nats in float32.
        straight: where the mean takes nothing of the output but x_hat, gradients pass through the clipping of the policy's x_hat
        as if it were not there, so that a pixel that lies beyond the bound can be called back. The value is the same. DDIM needs
        no such help, and must not have it: beyond the bound its mean follows the output itself (e), the other way.
        """
        row = self.row(step, state)
        difference = policy_output - prior_output
        if self.clip is None:
            return ((row.d * row.q + row.e) / row.sigma) * difference
        clean = self._clean(row, state, policy_output)
        if straight:
            loose = row.p * state + row.q * policy_output
            passed = torch.where(torch.as_tensor(row.e) == 0, loose, clean)
            clean = passed + (clean - passed).detach()
        return (row.d * (clean - self._clean(row, state, prior_output)) + row.e * difference) / row.sigma

    def reachable(self, state: Tensor, step: int | Tensor, prior_output: Tensor, shift: Tensor) -> Tensor:
        """The part of a wanted shift that x_hat can follow without leaving its bounds; all of it where nothing is clipped."""
        if self.clip is None:
            return shift
        row = self.row(step, state)
        # The shifts at both bounds; a raw output beside x_hat (e) moves with it.
        ends = [
            self.kernel_shift(state, step, (bound - row.p * state) / row.q, prior_output) for bound in (-self.clip, self.clip)
        ]
        lowest, highest = torch.minimum(*ends).clamp(max=0), torch.maximum(*ends).clamp(min=0)
        return shift.clamp(lowest, highest)

    def standardize(self, following: Tensor, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """z_k = (s_{k+1} - mu) / sigma_k, taken from the increment s_{k+1} - s_k; shape of ``state``.

        s_{k+1} - mu rounds at the state's size, the increment at the step's: 1e-4 against 4e-7 nats at 16384 dimensions and
        1000 steps in float32.
        """
        row = self.row(step, state)
        growth = self._table(state)[-1, step].reshape(-1, *[1] * (state.ndim - 1))
        drift = growth * state
        if self.clip is None:
            drift = drift + (row.d * row.q + row.e) * output
        else:
            drift = drift + row.d * self._clean(row, state, output) + row.e * output
        return ((following - state) - drift) / row.sigma

    @cached_property
    def bridge(self) -> tuple[Tensor, Tensor, Tensor]:
        """(c, d, tau) with s_{k+1} = c_k s_k + d_k x + tau_k eps for a known clean x: the chain noised back.

        tau_k² = noise_{k+1}² - c_k² noise_k² keeps every s_k at its nominal law N(signal_k x, noise_k²), so that at
        E = 0 the likelihood of these trajectories leaves the prior unchanged. Plain Markov noising is right only where c and
        tau are those of DDPM.

        Errors: ValueError where the table's levels do not follow from one another (DDIM on 'linspace' spacing, say).
        """
        rows = slice(0, self.num_kernels)
        c = (self.c - self.e * self.p / self.q)[rows]
        d = (self.d + self.e / self.q)[rows]
        following = slice(1, self.num_kernels + 1)
        misfit = (d - (self.signal[following] - c * self.signal[rows])).abs().max().item()
        variance = self.noise[following] ** 2 - c**2 * self.noise[rows] ** 2
        # What the last kernel before a decoder lands on feeds no further kernel, so only its mean matters there.
        inner = variance[:-1] if self.decoder else variance
        if not (misfit < 1e-4 and bool((inner > -1e-6).all())):
            raise ValueError(
                f"{self.name}: cannot noise samples back along this chain: its steps do not lead from one nominal noise"
                f" level to the next (misfit {misfit:.2g}, smallest variance {variance.min().item():.2g}). DDIM does this on"
                " 'linspace' and some 'trailing' spacings: use 'leading', or a step count that divides the training"
                " steps, or train on rollouts only."
            )
        return c, d, variance.clamp(min=0).sqrt()

    def bridged(self, state: Tensor, end: Tensor, step: Tensor) -> Tensor:
        """c s_k + d x: the mean of s_{k+1} given s_k and the path's end x; state and end [n, ...], step [n]."""
        c, d = (column.to(state)[step].reshape(-1, *[1] * (state.ndim - 1)) for column in self.bridge[:2])
        return c * state + d * end

    @cached_property
    def forgets_given_next(self) -> bool:
        """Whether s_k tells nothing more of x once s_{k+1} is known: c_k noise_k² signal_{k+1} = signal_k noise_{k+1}².

        True for DDPM, DDIM with eta = 1 and the Brownian chain, false for a smaller eta and for the flow SDEs. Only then is
        c s_k + d x the mean of s_{k+1} for a state s_k and an end x of the *same* path. False also without a bridge.
        """
        try:
            c = self.bridge[0]
        except ValueError:
            return False
        here, following = slice(0, self.num_kernels), slice(1, self.num_kernels + 1)
        left = c * self.noise[here] ** 2 * self.signal[following]
        return bool((left - self.signal[here] * self.noise[following] ** 2).abs().max() < 1e-4 * self.noise.max() ** 2)

    @property
    def forgets_start(self) -> bool:
        """Whether next to nothing of the start is left in the end.

        Only then may an end that is noised anew stand for a state of its path: where the end follows from the start, it does not.
        It is a stand-in, not the chain's own law, which `forgets_given_next` is about.
        """
        return self.remembered_share(1.0) <= FORGOTTEN

    def remembered_share(self, variance: float) -> float:
        """rho²: the share of s_K's variance that the start still explains, for Gaussian data of this variance.

        With the exact (linear) denoiser of N(0, variance I) the whole chain is linear, so this is a closed form.
        0 means that p(s_0) shared by prior and policy costs nothing.
        """
        if self.start_std == 0.0:
            return 0.0
        slope, spread = 1.0, 0.0
        for k, row in enumerate(self._floats):
            signal, noise = self.signal[k].item(), self.noise[k].item()
            gain = signal * variance / (signal**2 * variance + noise**2)
            factor = row.c + row.d * gain + row.e * (gain - row.p) / row.q
            slope, spread = factor * slope, factor**2 * spread + row.sigma**2
        start = slope**2 * self.start_std**2
        return float(start / (start + spread))

    def conditions(self, variance: float = 1.0) -> dict[str, str]:
        """The four conditions under which the fine-tuned marginal is the tilted one, as this chain meets them.

        ``variance`` is that of the data's widest direction. The start's share here is a Gaussian closed form; the
        certificate measures Var[log Z(s_0)] on the real energy.
        """
        if self.start_std == 0.0:
            start = "fixed start: exact"
        else:
            share = self.remembered_share(variance)
            if share <= FORGOTTEN:
                verdict = "forgotten"
            elif share <= 0.1:
                verdict = "faintly remembered: the certificate measures what it costs"
            else:
                verdict = "REMEMBERED: a tilt of this direction is partly lost"
            start = f"share of the start in a component of variance {variance:g}: {share:.2g} ({verdict})"
        if self.decoder:
            sigmas = " and ".join(f"{sigma:.2g}" for sigma in self.sigma[self.num_kernels :].tolist())
            which = "step" if self.decoder == 1 else f"{self.decoder} steps"
            verbs = "belongs to the prior and carries" if self.decoder == 1 else "belong to the prior and carry"
            last = f"the last {which} (sigma {sigmas}) {verbs} no ratio"
        else:
            last = f"the last step draws sigma {self.sigma[-1].item():.2g}, shared by prior and policy"
        return {
            "start": start,
            "last_step": last,
            "sigma": f"a policy moves the means of {self.num_kernels} kernels and no sigma: what that cannot reach stays a gap",
            "sum": "log-ratios are sums over dimensions, never means",
        }
