"""The exact denoiser of a law that is known in closed form, as a network that a chain can be run with."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..samplers.chain import Chain
from ..samplers.condition import Condition


class Law(Protocol):
    """A law of clean samples x [N, D], in the units of a chain's states."""

    def denoise(self, state: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[x | state] [N, D] for state = signal x + noise eps; state [N, D], signal and noise [] or [N]."""
        ...


class ExactDenoiser(nn.Module):
    """The exact denoiser of a law on a chain, as an output that the chain turns back into x_hat = E[x | s_k].

    Takes the chain's labels; a label that is not one of the chain's steps is an error. It has no parameters.
    """

    table: Tensor

    def __init__(self, law: Law, chain: Chain) -> None:
        super().__init__()
        self.law, self.chain = law, chain
        if chain.input_scale.ne(1).any():
            raise ValueError(f"{chain.name} scales its network's input; the exact denoiser is written for unscaled states.")
        columns = chain.timesteps, chain.p, chain.q, chain.signal[:-1], chain.noise[:-1]
        self.register_buffer("table", torch.stack(columns))

    def forward(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        table = self.table.to(state.device)
        labels = table[0].to(state.dtype)
        label = timestep.reshape(-1).to(state.dtype)
        step = (label[:, None] - labels).abs().argmin(-1)
        if (labels[step] - label).abs().max() > 1e-3:
            raise ValueError("the exact denoiser was asked for a timestep that its chain does not have.")
        p, q, signal, noise = table[1:, step]
        clean = self.law.denoise(state, signal, noise)
        return (clean - p.to(state)[:, None] * state) / q.to(state)[:, None]
