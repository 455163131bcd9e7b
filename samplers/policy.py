"""Denoisers, the frozen prior, and the trainable policy.

A denoiser is ``(state, timestep, condition) -> output``; nothing above it knows the network behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .chain import Chain


class Denoiser(Protocol):
    """state [N, ...], timestep [] or [N], condition [N, ...] or None → output, the shape of ``state``."""

    def __call__(self, state: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor: ...


def evaluate(denoiser: Denoiser, chain: Chain, state: Tensor, step: int | Tensor, condition: Tensor | None) -> Tensor:
    """The network's output at a chain's step, in the dtype of ``state`` whatever precision it ran in."""
    output = denoiser(chain.network_input(state, step), chain.timestep(step, state), condition)
    return output.to(state.dtype)


class DiffusersDenoiser(nn.Module):
    """A diffusers model (`UNet2DModel`, our `MLPDenoiser`, anything called as model(sample, timestep)) as a denoiser.

    A condition, where there is one, is passed as ``class_labels``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, state: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        extra = {} if condition is None else {"class_labels": condition}
        return self.model(state, timestep, return_dict=False, **extra)[0]


class ResidualDenoiser(nn.Module):
    """Frozen prior plus a network that starts at zero, for priors that cannot be trained (closed forms, black boxes).

    The prior is kept out of the module's parameters and state dict: it is frozen and saved elsewhere.
    """

    def __init__(self, prior: Denoiser, network: nn.Module) -> None:
        super().__init__()
        zero_output_layer_(network)
        self._prior: tuple[Denoiser] = (prior,)  # in a tuple, so that it does not register as a submodule
        self.residual = network if not _is_diffusers(network) else DiffusersDenoiser(network)

    def forward(self, state: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            prior = self._prior[0](state, timestep, condition)
        return prior + self.residual(state, timestep, condition)


def zero_output_layer_(network: nn.Module) -> None:
    """Zero the last linear or convolutional layer, in place, so that the network's output is zero.

    Errors: ValueError where the network has no such layer.
    """
    if hasattr(network, "zero_output_"):  # an `MLPDenoiser` has a skip around its last layer
        network.zero_output_()  # pyright: ignore[reportCallIssue]
        return
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    if not layers:
        raise ValueError(
            f"{type(network).__name__} has no linear or convolutional layer to zero, so a residual policy made of it"
            " would not start at the prior; end it in one."
        )
    with torch.no_grad():
        layers[-1].weight.zero_()
        if layers[-1].bias is not None:
            layers[-1].bias.zero_()


def _is_diffusers(network: object) -> bool:
    return hasattr(network, "save_pretrained") and hasattr(network, "config")


def as_denoiser(network: Any) -> Denoiser:
    """A diffusers model becomes a `DiffusersDenoiser`; what already is a denoiser stays as it is."""
    return DiffusersDenoiser(network) if _is_diffusers(network) else network


class Prior:
    """A frozen denoiser and the chain it is run with: together they define p_prior, the law of what is sampled.

    shape: of one state, without the batch. to_data: maps terminal states [B, ...] to the samples an energy sees (a
    scale, or a latent decoder); the identity where None.
    """

    def __init__(
        self, network: Any, chain: Chain, shape: tuple[int, ...], to_data: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.denoiser = as_denoiser(network)
        self.chain = chain
        self.shape = tuple(shape)
        self._to_data = to_data
        if isinstance(self.denoiser, nn.Module):
            self.denoiser.requires_grad_(False).eval()

    @torch.no_grad()
    def to_data(self, state: Tensor) -> Tensor:
        """What an energy sees of terminal states [B, ...]."""
        return state if self._to_data is None else self._to_data(state)

    @property
    def device(self) -> torch.device:
        if isinstance(self.denoiser, nn.Module):
            for parameter in self.denoiser.parameters():
                return parameter.device
        return torch.device("cpu")


def trainable_copy(prior: Prior) -> nn.Module:
    """A policy that starts as an exact copy of the prior and trains all its parameters.

    In evaluation mode, where it stays: dropout would make its log-ratio to the prior a lottery.

    Errors: ValueError where the prior's denoiser has no parameters; wrap it in `ResidualDenoiser` instead.
    """
    if not isinstance(prior.denoiser, nn.Module) or not any(True for _ in prior.denoiser.parameters()):
        raise ValueError(
            "this prior has no parameters to copy and train; pass policy=ResidualDenoiser(prior.denoiser, network), the"
            " frozen prior plus a network that starts at zero."
        )
    return copy.deepcopy(prior.denoiser).requires_grad_(True).eval()
