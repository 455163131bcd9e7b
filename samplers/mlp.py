"""A small MLP denoiser for low-dimensional data: a real diffusers model, saved and loaded as one."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import (
    ConfigMixin,
    register_to_config,  # pyright: ignore[reportUnknownVariableType]
)
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from .chain import Chain
from .shapes import Index, Timestep
from .typed import forked_rng, unique_with_inverse

FURTHEST = 10.0  # standard deviations that the estimate of an imperfect prior, from nearly nothing but noise, may seem to be off
OWN_FREQUENCIES = 4  # of a residual network: waves down to a length of 1.6 standard deviations


class MLPDenoiser(ModelMixin, ConfigMixin):
    """Residual MLP on random Fourier features of the scaled state, preconditioned as in EDM (arXiv 2206.00364, eq. 7).

        output = output_skip(t) · s + output_scale(t) · F(input_scale(t) · s, t)

    Where ``own_frequencies`` is positive, F has a second part, a sum over Fourier features of each coordinate alone, with weights
    that depend on t: what a product of one-dimensional laws needs, learned from far fewer samples than by the MLP.

    Where ``sees_prior`` is set, F sees the prior's estimate of the data beside the state, x_hat = p(t) · s + q(t) · (the prior's
    output). A tilt moves that estimate within what the prior holds possible, so that a network that knows it has less to learn.
    F then also has a part that is linear in state and estimate, with weights that depend on t: the whole answer to a quadratic
    energy where the prior is Gaussian, and most of it elsewhere.

    The functions of the timestep are tables of ``num_labels`` entries, interpolated linearly and stored with the weights
    (`set_preconditioning_`); as built input_scale, output_skip and output_scale are 1, 0 and 1. The Fourier features (width
    ``bandwidth``) let a small network follow the steep steps between modes.

    forward: (sample, timestep in [0, num_labels - 1]) → (output,).
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 2,
        width: int = 64,
        depth: int = 3,
        fourier_features: int = 64,
        bandwidth: float = 5.0,
        num_labels: int = 1001,
        own_frequencies: int = 0,
        sees_prior: bool = False,
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", bandwidth * torch.randn(dim, fourier_features, generator=generator))
        octaves = 2.0 ** torch.arange(6)
        self.register_buffer("time_frequencies", math.pi * octaves / (num_labels - 1))
        as_built = [1.0, 0.0, 1.0, *([1.0, 0.0] if sees_prior else [])]  # the last two are p and q
        self.register_buffer("preconditioning", torch.tensor(as_built)[:, None].repeat(1, num_labels))
        self.time = nn.Sequential(nn.Linear(13, width), nn.SiLU(), nn.Linear(width, width * (depth + 1)))
        self.inward = nn.Linear((2 if sees_prior else 1) * dim + 2 * fourier_features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outward = nn.Linear(width, dim)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)
        self.own = OwnWaves(dim, own_frequencies) if own_frequencies else None
        self.sees_prior = sees_prior
        self.linear = LinearPath(2 * dim, width, dim) if sees_prior else None

    def forward(
        self,
        sample: Float[Tensor, " n dim"],
        timestep: Timestep | float,
        return_dict: bool = False,
        class_labels: Index | None = None,
        prior_output: Float[Tensor, " n dim"] | None = None,
    ) -> tuple[Float[Tensor, " n dim"]]:
        if class_labels is not None:
            raise ValueError("MLPDenoiser is unconditional; it was given class_labels.")
        if self.sees_prior != (prior_output is not None):
            raise ValueError("an MLPDenoiser takes prior_output where it was built with sees_prior, and only there.")
        label = torch.as_tensor(timestep, device=sample.device, dtype=self.frequencies.dtype).reshape(-1)
        # A chain has few distinct labels: embed each once.
        label, inverse = unique_with_inverse(label)
        low = label.floor().clamp(0, self.num_labels - 2)
        fraction = label - low
        low = low.long()
        table = torch.lerp(self.preconditioning[:, low], self.preconditioning[:, low + 1], fraction)
        phase = label[:, None] * self.time_frequencies
        embedded = torch.cat([label[:, None] / (self.num_labels - 1), phase.sin(), phase.cos()], 1)
        shifts = self.time(embedded)
        if len(label) > 1:
            shifts, table = shifts[inverse], table[:, inverse]
        input_scale, output_skip, output_scale, *estimate = table[..., None]

        state = input_scale * sample
        angles = state @ self.frequencies
        first, *rest = shifts.chunk(len(self.hidden) + 1, 1)
        inputs = [state, angles.sin(), angles.cos()]
        if prior_output is not None:
            p, q = estimate
            data = p * sample + q * prior_output
            inputs.append(data / (1 + (data / FURTHEST).square()).sqrt())
        hidden = nn.functional.silu(self.inward(torch.cat(inputs, 1)) + first)
        for layer, shift in zip(self.hidden, rest, strict=True):
            hidden = hidden + nn.functional.silu(layer(hidden) + shift)
        output = self.outward(hidden)
        if self.own is not None:
            output = output + self.own(state, embedded, inverse)
        if self.linear is not None:
            output = output + self.linear(torch.cat([state, inputs[-1]], 1), embedded, inverse)
        return (output_skip * sample + output_scale * output,)

    @torch.no_grad()
    def zero_output_(self) -> None:
        """Make the output zero, the skip included."""
        self.preconditioning[1].zero_()
        self.outward.weight.zero_()
        self.outward.bias.zero_()
        if self.own is not None:
            self.own.zero_output_()
        if self.linear is not None:
            self.linear.zero_output_()

    @torch.no_grad()
    def set_preconditioning_(
        self,
        timesteps: Float[Tensor, " n"],
        p: Float[Tensor, " n"],
        q: Float[Tensor, " n"],
        signal: Float[Tensor, " n"],
        noise: Float[Tensor, " n"],
        data_std: float,
    ) -> MLPDenoiser:
        """Set the tables so that F has unit-variance inputs and targets for data of standard deviation ``data_std``.

        All [n] float64, at ascending ``timesteps`` (interpolated to the labels between them), with x_hat = p s + q out.
        """
        spread = (signal**2 * data_std**2 + noise**2).clamp(min=1e-6).sqrt()
        skip = signal * data_std**2 / spread**2
        scale = data_std * noise / spread
        return self.set_tables_(timesteps, torch.stack([1 / spread, (skip - p) / q, scale / q]))

    @torch.no_grad()
    def set_tables_(self, timesteps: Float[Tensor, " n"], columns: Float[Tensor, "3 n"]) -> MLPDenoiser:
        """Set input_scale, output_skip and output_scale at ascending ``timesteps``, interpolated to the labels between them."""
        self.preconditioning[:3] = self._at_labels(timesteps, columns)
        return self

    @torch.no_grad()
    def set_estimate_(self, timesteps: Float[Tensor, " n"], columns: Float[Tensor, "2 n"]) -> MLPDenoiser:
        """Set p and q of the prior's estimate, for samples as the network is fed them, in the same way."""
        self.preconditioning[3:] = self._at_labels(timesteps, columns)
        return self

    def _at_labels(self, timesteps: Float[Tensor, " n"], columns: Float[Tensor, "rows n"]) -> Float[Tensor, "rows labels"]:
        labels = torch.arange(self.num_labels, dtype=torch.float64)
        right = torch.searchsorted(timesteps, labels).clamp(1, len(timesteps) - 1)
        left = right - 1
        fraction = ((labels - timesteps[left]) / (timesteps[right] - timesteps[left])).clamp(0, 1)
        return torch.lerp(columns[:, left], columns[:, right], fraction)


class OwnWaves(nn.Module):
    """Of each coordinate a function of itself: a line, and sines and cosines of the frequencies 1 to ``count`` per unit, with
    weights that follow from the timestep; zero at the start."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(13, 64), nn.Linear(64, dim * (2 * count + 1))
        self.zero_output_()

    def forward(
        self, state: Float[Tensor, " n dim"], embedded: Float[Tensor, " labels 13"], inverse: Index
    ) -> Float[Tensor, " n dim"]:
        """embedded: of the distinct timesteps; inverse: which of them each state has."""
        weights = self.outward(nn.functional.silu(self.inward(embedded)))
        if len(weights) > 1:
            weights = weights[inverse]
        line, *waves = weights.reshape(len(weights), -1, state.shape[1]).unbind(1)
        total = line * state
        for number, (sine, cosine) in enumerate(zip(waves[::2], waves[1::2], strict=True), start=1):
            angle = number * state
            total = total + sine * angle.sin() + cosine * angle.cos()
        return total

    @torch.no_grad()
    def zero_output_(self) -> None:
        """Make the output zero."""
        self.outward.weight.zero_()
        self.outward.bias.zero_()


class LinearPath(nn.Module):
    """A linear map of rank ``width`` at most, W_2 diag(g(t)) (W_1 x + b), zero at the start."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.inward = nn.Linear(inputs, width)
        self.gate = nn.Sequential(nn.Linear(13, 64), nn.SiLU(), nn.Linear(64, width))
        self.outward = nn.Linear(width, outputs, bias=False)
        self.zero_output_()

    def forward(
        self, x: Float[Tensor, " n inputs"], embedded: Float[Tensor, " labels 13"], inverse: Index
    ) -> Float[Tensor, " n outputs"]:
        """embedded: of the distinct timesteps; inverse: which of them each state has."""
        gate = self.gate(embedded)
        return self.outward((gate[inverse] if len(gate) > 1 else gate) * self.inward(x))

    @torch.no_grad()
    def zero_output_(self) -> None:
        """Make the output zero."""
        self.outward.weight.zero_()


def precondition_for_(model: MLPDenoiser, chain: Chain, data_std: float) -> MLPDenoiser:
    """Set a network's tables from a (finely spaced) chain's own levels, in place."""
    order = torch.argsort(chain.timesteps)
    levels = [column[: chain.num_steps][order] for column in (chain.p, chain.q, chain.signal, chain.noise)]
    return model.set_preconditioning_(chain.timesteps[order], *levels, data_std=data_std)


def residual_network(chain: Chain, dim: int) -> MLPDenoiser:
    """A network for the residual beside a frozen prior whose data are of about unit variance, from a fixed seed.

    Where the prior is exact, so is the output that a tilt adds to it: x_hat shifts by noise² · (grad log h / signal) with the
    soft value log h (Tweedie's formula twice). The bracket, which is what the network gives, is the tilt's own gradient where
    there is little noise, and the shift of the mean where there is nothing else: of order one at every step.
    """
    with forked_rng():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs as well
        bandwidth = 1.5 / math.sqrt(dim)
        own = OWN_FREQUENCIES
        network = MLPDenoiser(dim, width=128, depth=3, bandwidth=bandwidth, own_frequencies=own, sees_prior=True)
    order = torch.argsort(chain.timesteps)
    columns = (chain.p / chain.input_scale, chain.q, chain.signal, chain.noise)
    p, q, signal, noise = (column[: chain.num_steps][order] for column in columns)
    network.set_estimate_(chain.timesteps[order], torch.stack([p, q]))
    if bool(torch.isfinite(signal + noise).all()):
        spread = (signal**2 + noise**2).clamp(min=1e-6).sqrt()
        network.set_tables_(chain.timesteps[order], torch.stack([1 / spread, torch.zeros_like(q), noise**2 / q]))
    return network
