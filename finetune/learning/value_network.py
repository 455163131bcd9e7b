"""The network of the soft value: a small one, so that it can be learned from a few thousand paths."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ...samplers.shapes import Index, States

WIDTH, CHANNELS, DROPOUT = 96, 24, 0.3
BANDWIDTH = 3.0  # of the Fourier features, in 1 / sqrt(dimension)


class ValueNetwork(nn.Module):
    """What the prior expects of the data (x_hat) at states of a chain, their steps and the rows of their conditions, if any
    → log h; zero at the start.

    The prior's network has found out what of a state is noise, which a few thousand energies would not teach. scale: the standard
    deviation of x_hat at each step. spread: that of -E/alpha over the prior paths of each condition.
    Images [C, H, W] pass two convolutions that halve them, anything else is flattened. Vectors may have random Fourier
    features beside them (``waves``), without which a small network does not follow the steep edges of h between modes; its
    gradient is noisier with them. Each layer is scaled and shifted by an embedding of the step, and of the condition where there
    are several.
    """

    scale: Float[Tensor, " scales"]
    waves: Float[Tensor, "dim waves"]
    spread: Float[Tensor, " conditions"]

    def __init__(
        self,
        shape: tuple[int, ...],
        steps: int,
        scale: Float[Tensor, " {steps+1}"] | None = None,
        spread: Float[Tensor, " conditions"] | None = None,
        waves: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(steps + 1) if scale is None else scale.clone())
        self.register_buffer("spread", torch.ones(1) if spread is None else spread.clone())
        self.step = nn.Embedding(steps + 1, 64)
        layers: list[nn.Module] = []
        outputs: list[int] = []
        size = math.prod(shape)
        if len(shape) == 3:
            channels, height, width = shape
            for out in (CHANNELS, 2 * CHANNELS):
                stride = 1 if out == CHANNELS and min(height, width) <= 8 else 2
                layers.append(nn.Conv2d(channels, out, 3, stride=stride, padding=1))
                outputs.append(out)
                channels, height, width = out, -(-height // stride), -(-width // stride)
            size = channels * height * width
        fixed = torch.Generator().manual_seed(0)
        waves = waves if len(shape) == 1 else 0
        self.register_buffer("waves", BANDWIDTH / math.sqrt(size) * torch.randn(size, waves, generator=fixed))
        size += 2 * waves
        layers += [nn.Linear(size, WIDTH), nn.Linear(WIDTH, WIDTH)]
        self.layers = nn.ModuleList(layers)
        outputs += [WIDTH, WIDTH]
        self.shifts = nn.ModuleList(nn.Linear(64, 2 * out) for out in outputs)
        self.drop = nn.Dropout(DROPOUT)
        self.out = nn.Linear(WIDTH, 3)  # log h, and the standardized mean and (before a softplus) variance of -E/alpha
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.group = nn.Embedding(len(self.spread), 64) if len(self.spread) > 1 else None

    def forward(self, data: States, step: Index, group: Index | None = None) -> Float[Tensor, " n"]:
        return self.heads(data, step, group)[:, 0]

    def estimates(self, data: States, step: Index, times: float = 1.0, group: Index | None = None) -> Float[Tensor, " n 2"]:
        """At a temperature lower by ``times`` than the one that was learned: log h grows with 1/alpha to first order, the
        cumulants with its first and second power."""
        log_h, mean, variance = self.heads(data, step, group).unbind(1)
        spread = times * (self.spread if group is None else self.spread[group])
        return torch.stack([times * log_h, spread * mean + 0.5 * spread.square() * variance], 1)

    def heads(self, data: States, step: Index, group: Index | None = None) -> Float[Tensor, " n 3"]:
        """log h; mean and variance of -E/alpha given the state, in units of ``spread``."""
        hidden = data / self.scale[step].view(-1, *[1] * (data.ndim - 1))
        if self.waves.shape[1]:
            angle = hidden @ self.waves
            hidden = torch.cat([hidden, angle.sin(), angle.cos()], 1)
        embedded = self.step(step)
        if self.group is not None:
            assert group is not None
            embedded = embedded + self.group(group)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            if isinstance(layer, nn.Linear):
                hidden = self.drop(hidden.flatten(1))
            scale, offset = shift(embedded).chunk(2, 1)
            hidden = layer(hidden)
            around = (len(hidden), -1, *[1] * (hidden.ndim - 2))
            hidden = functional.silu(hidden * (1 + scale.view(around)) + offset.view(around))
        log_h, mean, variance = self.out(hidden).unbind(1)
        return torch.stack([log_h, mean, functional.softplus(variance + 0.5)], 1)
