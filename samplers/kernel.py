"""What one step of a chain is: how the next state is drawn, and the log-ratio of policy and prior.

Everything above this file works with the methods of `Kernel`. What else knows that the noise is Gaussian draws it
(`rollout.step_noise`), gives it another size (`inflated`) or noises samples back (`bridge`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """The kernels of all steps, by step: an int for one step, or a LongTensor [N] with a step a state.

    state, following, output, noise, shift, z: [N, ...]. A shift delta is what the policy changes at a step, in the units of the
    step's noise, so that a log-ratio follows from it.
    """

    def std(self, step: int | Tensor, like: Tensor) -> Tensor | float:
        """Standard deviation of the step's noise: a float, or [N, 1, ...] shaped for ``like``."""
        ...

    def mean(self, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """Mean of s_{k+1} given s_k and the network's output."""
        ...

    def sample(self, state: Tensor, step: int | Tensor, output: Tensor, noise: Tensor) -> Tensor:
        """s_{k+1} from the network's output and standard noise."""
        ...

    def clean(self, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """x_hat, what the network says the clean sample is."""
        ...

    def shift(
        self, state: Tensor, step: int | Tensor, policy_output: Tensor, prior_output: Tensor, *, straight: bool = False
    ) -> Tensor:
        """delta_k, what the policy changes against the prior. straight: gradients pass through a clipping of x_hat."""
        ...

    def reachable(self, state: Tensor, step: int | Tensor, prior_output: Tensor, shift: Tensor) -> Tensor:
        """The part of a wanted shift that the network can make by some output."""
        ...

    def standardize(self, following: Tensor, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """z_k, the noise with which a stored s_{k+1} follows from s_k by this output."""
        ...

    def log_ratio_from_noise(self, noise: Tensor, shift: Tensor) -> Tensor:
        """log policy - log prior [N], nats, from the noise that the policy itself drew."""
        ...

    def log_ratio_from_states(self, z: Tensor, shift: Tensor) -> Tensor:
        """log policy - log prior [N], nats, from the noise z of any next state under the prior."""
        ...

    def log_density(self, following: Tensor, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """log pi(s_{k+1} | s_k) [N], nats, up to a constant of the step; differentiable by ``output``."""
        ...


class Row(NamedTuple):
    """Coefficients of one step, or of a batch of steps (each then has shape [N, 1, ...])."""

    p: Tensor | float
    q: Tensor | float
    c: Tensor | float
    d: Tensor | float
    e: Tensor | float
    sigma: Tensor | float


class Columns:
    """Columns [K] float64 as one table, made once for each device and dtype that it is asked for."""

    def __init__(self, *columns: Tensor) -> None:
        self._table = torch.stack(columns)
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, state: Tensor) -> Tensor:
        """[columns, K] on the device and in the dtype of ``state``."""
        key = (state.device, state.dtype)
        if key not in self._made:
            self._made[key] = self._table.to(state)
        return self._made[key]


@dataclass(frozen=True, eq=False)
class GaussianKernel:
    """N(c s + d clip(p s + q out) + e out, sigma² I), the same sigma for policy and prior; columns [K] float64.

    Log-ratios are in difference form: nats, summed over dimensions, float32. Two log-densities are never subtracted. With
    z = (s' - mu_prior) / sigma and delta = (mu_policy - mu_prior) / sigma,

        l = <z, delta> - ½ ||delta||²          from stored states
        l = <eps, delta> + ½ ||delta||²        from the noise that the policy itself drew  (z = eps + delta)
    """

    p: Tensor
    q: Tensor
    c: Tensor
    d: Tensor
    e: Tensor
    sigma: Tensor
    clip: float | None

    @cached_property
    def rows(self) -> list[Row]:
        """The coefficients of every step as floats."""
        columns = [getattr(self, name).tolist() for name in Row._fields]
        return [Row(*values) for values in zip(*columns, strict=True)]

    @cached_property
    def _columns(self) -> Columns:
        return Columns(*(getattr(self, name) for name in Row._fields), self._growth)

    @cached_property
    def _growth(self) -> Tensor:
        """[K]: coefficient of s_k in (mean - s_k), with the state's share of x_hat unless that is clipped."""
        return self.c - 1 if self.clip is not None else self.c + self.d * self.p - 1

    def row(self, step: int | Tensor, like: Tensor) -> Row:
        """Coefficients at ``step``: floats for an int, tensors [N, 1, ...] shaped for ``like`` for a LongTensor [N]."""
        if isinstance(step, int):
            return self.rows[step]
        columns = self._columns.like(like)[: len(Row._fields), step]
        return Row(*columns.reshape(len(Row._fields), -1, *[1] * (like.ndim - 1)))

    def std(self, step: int | Tensor, like: Tensor) -> Tensor | float:
        return self.row(step, like).sigma

    def clean(self, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """x_hat, clipped where the scheduler clips."""
        return self._clean(self.row(step, state), state, output)

    def _clean(self, row: Row, state: Tensor, output: Tensor) -> Tensor:
        clean = row.p * state + row.q * output
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def mean(self, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        row = self.row(step, state)
        if self.clip is None:  # linear in both: two products instead of five
            return (row.c + row.d * row.p) * state + (row.d * row.q + row.e) * output
        return row.c * state + row.d * self._clean(row, state, output) + row.e * output

    def sample(self, state: Tensor, step: int | Tensor, output: Tensor, noise: Tensor) -> Tensor:
        return self.mean(state, step, output) + self.std(step, state) * noise

    def shift(
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
        ends = [self.shift(state, step, (bound - row.p * state) / row.q, prior_output) for bound in (-self.clip, self.clip)]
        lowest, highest = torch.minimum(*ends).clamp(max=0), torch.maximum(*ends).clamp(min=0)
        return shift.clamp(lowest, highest)

    def standardize(self, following: Tensor, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """z_k = (s_{k+1} - mu) / sigma_k, taken from the increment s_{k+1} - s_k.

        s_{k+1} - mu rounds at the state's size, the increment at the step's: 1e-4 against 4e-7 nats at 16384 dimensions and
        1000 steps in float32.
        """
        row = self.row(step, state)
        growth = self._columns.like(state)[-1, step].reshape(-1, *[1] * (state.ndim - 1))
        drift = growth * state
        if self.clip is None:
            drift = drift + (row.d * row.q + row.e) * output
        else:
            drift = drift + row.d * self._clean(row, state, output) + row.e * output
        return ((following - state) - drift) / row.sigma

    def log_ratio_from_noise(self, noise: Tensor, shift: Tensor) -> Tensor:
        """<eps, delta> + ½ ||delta||²."""
        return (shift * torch.add(noise, shift, alpha=0.5)).flatten(1).sum(1)

    def log_ratio_from_states(self, z: Tensor, shift: Tensor) -> Tensor:
        """<z, delta> - ½ ||delta||²."""
        return (shift * torch.sub(z, shift, alpha=0.5)).flatten(1).sum(1)

    def log_density(self, following: Tensor, state: Tensor, step: int | Tensor, output: Tensor) -> Tensor:
        """-½ ||(s_{k+1} - mu) / sigma_k||²."""
        z = (following - self.mean(state, step, output)) / self.std(step, state)
        return -0.5 * z.square().flatten(1).sum(1)
