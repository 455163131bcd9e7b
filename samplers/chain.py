"""The sampler as a table: one row a step, no scheduler copied.

    x_hat = p_k s_k + q_k out                                (what the network says the clean sample is)
    mu    = c_k s_k + d_k clip(x_hat) + e_k out
    s_k+1 = mu + sigma_k eps,    eps ~ N(0, I)

Step k runs along *sampling*: ``states[0]`` is the start, ``states[K]`` the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from .kernel import Columns, GaussianKernel, Kernel, Row
from .shapes import AnyShape, Index, States, Steps, Timestep
from .typed import floats

# Below this a standard deviation is a clamp of the scheduler (DDPM's 1e-10), not a noise.
SIGMA_ZERO = 1e-6
FORGOTTEN = 0.01  # share of the end that the start explains, at most, where it counts as forgotten


@dataclass(frozen=True, eq=False)
class Chain:
    """A finite chain of Gaussian kernels around a denoising network.

    Every column is kept as float64. ``signal`` and ``noise`` mean
    s_k ≈ signal_k x + noise_k eps for a clean sample x (nan where the chain has no such level).

    trained: the steps that carry a log-ratio, increasing. The others belong to the prior: policy and prior share them, so that
    the tilted law is exact for the chain as it is run. ``clip`` is the bound of x_hat, or None.

    Errors: ValueError where a row is non-finite or a trained row has no noise, since a noiseless kernel has no density.
    """

    name: str
    timesteps: Real[Tensor, " steps"]
    p: Real[Tensor, " steps"]
    q: Real[Tensor, " steps"]
    c: Real[Tensor, " steps"]
    d: Real[Tensor, " steps"]
    e: Real[Tensor, " steps"]
    sigma: Real[Tensor, " steps"]
    input_scale: Real[Tensor, " steps"]
    signal: Real[Tensor, " steps+1"]
    noise: Real[Tensor, " steps+1"]
    start_std: float
    trained: tuple[int, ...]
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("timesteps", *Row._fields, "input_scale", "signal", "noise"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu().double())
        for name in ("timesteps", *Row._fields, "input_scale"):
            column = getattr(self, name)
            bad = (~torch.isfinite(column)).nonzero().flatten()
            if len(bad):
                raise ValueError(
                    f"{self.name}: column '{name}' is not finite at step {int(bad[0])} of {self.num_steps}; such a step has no"
                    " kernel. Zero-terminal-SNR betas and variance_type='fixed_large_log' do this: use an ordinary beta"
                    " schedule and variance_type 'fixed_large' or 'fixed_small'."
                )
        if not self.trained:
            raise ValueError(
                f"{self.name}: the only step belongs to the prior, so nothing is left to carry a log-ratio;"
                " take at least two steps."
            )
        inside = range(self.num_steps)
        assert all(k in inside for k in self.trained) and sorted(set(self.trained)) == list(self.trained), self.trained
        quiet = [k for k in self.trained if self.noiseless(k)]
        if quiet:
            raise ValueError(
                f"{self.name}: step {quiet[0]} of {self.num_steps} draws no noise (sigma < {SIGMA_ZERO:g}), so the log-ratio of"
                " policy and prior is undefined there. Use a stochastic sampler (DDIM with eta > 0, DDPM, Euler ancestral,"
                " a flow SDE); a noiseless *last* step is accepted with last_step='prior' or an explicit sigma."
            )

    @property
    def num_steps(self) -> int:
        """K, the number of network evaluations a sample costs."""
        return len(self.timesteps)

    @property
    def num_kernels(self) -> int:
        """Number of trained steps: the rows of a matrix of log-ratios."""
        return len(self.trained)

    @property
    def last_trained(self) -> int:
        """The last step that carries a log-ratio; what follows belongs to the prior."""
        return self.trained[-1]

    @property
    def prior_last_steps(self) -> int:
        """Number of last steps that belong to the prior."""
        return self.num_steps - 1 - self.last_trained

    def noiseless(self, step: int) -> bool:
        """Whether a step draws no noise."""
        return self.sigma[step].item() < SIGMA_ZERO

    @cached_property
    def _maps(self) -> dict[torch.device, tuple[Int[Tensor, " kernels"], Int[Tensor, " steps"]]]:
        return {}

    def _map(self, like: AnyShape) -> tuple[Int[Tensor, " kernels"], Int[Tensor, " steps"]]:
        """(the step of every row, the row of every step or -1), on the device of ``like``."""
        if like.device not in self._maps:
            step = torch.tensor(self.trained)
            row = torch.full((self.num_steps,), -1)
            row[step] = torch.arange(len(step))
            self._maps[like.device] = step.to(like.device), row.to(like.device)
        return self._maps[like.device]

    def step_of_row(self, row: Index) -> Index:
        """The steps of rows of a matrix of log-ratios [kernels, batch]."""
        return self._map(row)[0][row]

    def row_of_step(self, step: Index) -> Index:
        """The rows of steps in a matrix of log-ratios, -1 where a step is not trained."""
        return self._map(step)[1][step]

    @property
    def kernel(self) -> Kernel:
        """What one step is: its mean, its noise, its log-ratio."""
        return self._gaussian

    @cached_property
    def _gaussian(self) -> GaussianKernel:
        return GaussianKernel(self.p, self.q, self.c, self.d, self.e, self.sigma, self.clip)

    @property
    def sensitivity(self) -> Float[Tensor, " kernels"]:
        """By how many of its standard deviations a kernel's mean moves where the network's output moves by 1."""
        rows = list(self.trained)
        return ((self.d * self.q + self.e)[rows] / self.sigma[rows]).abs()

    @cached_property
    def _unscaled(self) -> bool:
        return bool((self.input_scale == 1).all())

    @cached_property
    def _scales(self) -> list[float]:
        return floats(self.input_scale)

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self.timesteps, self.input_scale)

    def timestep(self, step: Steps, like: States) -> Timestep:
        """The label that a network is conditioned on."""
        return self._columns.like(like)[0, step]

    def network_input(self, state: States, step: Steps) -> States:
        """What the network is fed: the state, divided by sqrt(sigma² + 1) for Euler ancestral."""
        if self._unscaled:
            return state
        if isinstance(step, int):
            return state * self._scales[step]
        return state * self._columns.like(state)[1, step].reshape(-1, *[1] * (state.ndim - 1))

    @property
    def forgets_start(self) -> bool:
        """Whether next to nothing of the start is left in the end.

        Only then may an end that is noised anew stand for a state of its path: where the end follows from the start, it does not.
        It is a stand-in, not the chain's own law, which `bridge.forgets_given_next` is about.
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
        for k, row in enumerate(self._gaussian.rows):
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
        if self.prior_last_steps:
            own = [f"{sigma:.2g}" for sigma in floats(self.sigma[self.last_trained + 1 :])]
            sigmas = " and ".join(own) if len(own) <= 3 else f"{own[0]} to {own[-1]}"
            which = "step" if self.prior_last_steps == 1 else f"{self.prior_last_steps} steps"
            verbs = "belongs to the prior and carries" if self.prior_last_steps == 1 else "belong to the prior and carry"
            last = f"the last {which} (sigma {sigmas}) {verbs} no ratio"
        else:
            last = f"the last step draws sigma {self.sigma[-1].item():.2g}, shared by prior and policy"
        return {
            "start": start,
            "last_step": last,
            "sigma": f"a policy moves the means of {self.num_kernels} kernels and no sigma: what that cannot reach stays a gap",
            "sum": "log-ratios are sums over dimensions, never means",
        }
