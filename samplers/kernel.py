"""What one step of a chain is: how the next state is drawn, and the log-ratio of policy and prior.

Everything above this file works with the methods of `Kernel`. What else knows that the noise is Gaussian draws it
(`rollout.step_noise`), gives it another size (`inflated`) or noises samples back (`bridge`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .shapes import States, Steps

Coefficient = float | Float[Tensor, " n ..."]  # of one step, or of one for each state, shaped to be multiplied with states


class Kernel(Protocol):
    """The kernels of all steps, by step: an int for one step, or a tensor with a step for each state.

    A shift delta is what the policy changes at a step, in the units of the
    step's noise, so that a log-ratio follows from it.
    """

    def std(self, step: Steps, like: States) -> Coefficient:
        """Standard deviation of the step's noise: a float, or one for each state, shaped for ``like``."""
        ...

    def mean(self, state: States, step: Steps, output: States) -> States:
        """Mean of s_{k+1} given s_k and the network's output."""
        ...

    def sample(self, state: States, step: Steps, output: States, noise: States) -> States:
        """s_{k+1} from the network's output and standard noise."""
        ...

    def clean(self, state: States, step: Steps, output: States) -> States:
        """x_hat, what the network says the clean sample is."""
        ...

    def shift(self, state: States, step: Steps, policy_output: States, prior_output: States, *, straight: bool = False) -> States:
        """delta_k, what the policy changes against the prior. straight: gradients pass through a clipping of x_hat."""
        ...

    def reachable(self, state: States, step: Steps, prior_output: States, shift: States) -> States:
        """The part of a wanted shift that the network can make by some output."""
        ...

    def standardize(self, following: States, state: States, step: Steps, output: States) -> States:
        """z_k, the noise with which a stored s_{k+1} follows from s_k by this output."""
        ...

    def log_ratio_from_noise(self, noise: States, shift: States) -> Float[Tensor, " n"]:
        """log policy - log prior, nats, from the noise that the policy itself drew."""
        ...

    def log_ratio_from_states(self, z: States, shift: States) -> Float[Tensor, " n"]:
        """log policy - log prior, nats, from the noise z of any next state under the prior."""
        ...

    def log_density(self, following: States, state: States, step: Steps, output: States) -> Float[Tensor, " n"]:
        """log pi(s_{k+1} | s_k), nats, up to a constant of the step; differentiable by ``output``."""
        ...


class Row(NamedTuple):
    """Coefficients of one step, or of one for each state (each then has the shape [n, 1, ...])."""

    p: Coefficient
    q: Coefficient
    c: Coefficient
    d: Coefficient
    e: Coefficient
    sigma: Coefficient


class Columns:
    """Columns as one table, float64, made once for each device and dtype that it is asked for."""

    def __init__(self, *columns: Float[Tensor, " steps"]) -> None:
        self._table = torch.stack(columns)
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, state: States) -> Float[Tensor, " columns steps"]:
        """The table on the device and in the dtype of ``state``."""
        key = (state.device, state.dtype)
        if key not in self._made:
            self._made[key] = self._table.to(state)
        return self._made[key]


@dataclass(frozen=True, eq=False)
class GaussianKernel:
    """N(c s + d clip(p s + q out) + e out, sigma² I), the same sigma for policy and prior; columns in float64.

    Log-ratios are in difference form: nats, summed over dimensions, float32. Two log-densities are never subtracted. With
    z = (s' - mu_prior) / sigma and delta = (mu_policy - mu_prior) / sigma,

        l = <z, delta> - ½ ||delta||²          from stored states
        l = <eps, delta> + ½ ||delta||²        from the noise that the policy itself drew  (z = eps + delta)
    """

    p: Float[Tensor, " steps"]
    q: Float[Tensor, " steps"]
    c: Float[Tensor, " steps"]
    d: Float[Tensor, " steps"]
    e: Float[Tensor, " steps"]
    sigma: Float[Tensor, " steps"]
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
    def _growth(self) -> Float[Tensor, " steps"]:
        """The coefficient of s_k in (mean - s_k), with the state's share of x_hat unless that is clipped."""
        return self.c - 1 if self.clip is not None else self.c + self.d * self.p - 1

    def row(self, step: Steps, like: States) -> Row:
        """Coefficients at ``step``: floats for an int, else tensors [n, 1, ...] shaped for ``like``."""
        if isinstance(step, int):
            return self.rows[step]
        columns = self._columns.like(like)[: len(Row._fields), step]
        return Row(*columns.reshape(len(Row._fields), -1, *[1] * (like.ndim - 1)))

    def std(self, step: Steps, like: States) -> Coefficient:
        return self.row(step, like).sigma

    def clean(self, state: States, step: Steps, output: States) -> States:
        """x_hat, clipped where the scheduler clips."""
        return self._clean(self.row(step, state), state, output)

    def _clean(self, row: Row, state: States, output: States) -> States:
        clean = row.p * state + row.q * output
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def mean(self, state: States, step: Steps, output: States) -> States:
        row = self.row(step, state)
        if self.clip is None:  # linear in both: two products instead of five
            return (row.c + row.d * row.p) * state + (row.d * row.q + row.e) * output
        return row.c * state + row.d * self._clean(row, state, output) + row.e * output

    def sample(self, state: States, step: Steps, output: States, noise: States) -> States:
        return self.mean(state, step, output) + self.std(step, state) * noise

    def shift(self, state: States, step: Steps, policy_output: States, prior_output: States, *, straight: bool = False) -> States:
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

    def reachable(self, state: States, step: Steps, prior_output: States, shift: States) -> States:
        """The part of a wanted shift that x_hat can follow without leaving its bounds; all of it where nothing is clipped."""
        if self.clip is None:
            return shift
        row = self.row(step, state)
        # The shifts at both bounds; a raw output beside x_hat (e) moves with it.
        ends = [self.shift(state, step, (bound - row.p * state) / row.q, prior_output) for bound in (-self.clip, self.clip)]
        lowest, highest = torch.minimum(*ends).clamp(max=0), torch.maximum(*ends).clamp(min=0)
        return shift.clamp(lowest, highest)

    def standardize(self, following: States, state: States, step: Steps, output: States) -> States:
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

    def log_ratio_from_noise(self, noise: States, shift: States) -> Float[Tensor, " n"]:
        """<eps, delta> + ½ ||delta||²."""
        return (shift * torch.add(noise, shift, alpha=0.5)).flatten(1).sum(1)

    def log_ratio_from_states(self, z: States, shift: States) -> Float[Tensor, " n"]:
        """<z, delta> - ½ ||delta||²."""
        return (shift * torch.sub(z, shift, alpha=0.5)).flatten(1).sum(1)

    def log_density(self, following: States, state: States, step: Steps, output: States) -> Float[Tensor, " n"]:
        """-½ ||(s_{k+1} - mu) / sigma_k||²."""
        z = (following - self.mean(state, step, output)) / self.std(step, state)
        return -0.5 * z.square().flatten(1).sum(1)
