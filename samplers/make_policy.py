"""Policies that start exactly at a prior: a copy, LoRA adapters, or a residual network beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import nn

from .denoiser import DiffusersDenoiser, ResidualDenoiser, is_diffusers
from .lora import add_adapters, without_adapters
from .mlp import residual_network
from .policy import Policy, PolicyKind
from .prior import Prior
from .typed import forked_rng


def make_policy(
    prior: Prior,
    kind: PolicyKind = "full",
    *,
    rank: int = 8,
    targets: tuple[str, ...] = (),
    gradient_checkpointing: bool = False,
) -> Policy:
    """A policy that starts exactly at the prior, in evaluation mode (dropout would make log-ratios a lottery).

    rank, targets: of LoRA adapters; targets are names of layers or endings of such names ('to_q', 'resnets.0.conv1'), by
    default every linear or convolutional layer larger than its adapter (`lora.add_adapters`). The weights that start at
    random do so from a fixed seed. full: of a prior of vectors without parameters, which leaves nothing to copy, a residual
    network (`residual_of`). gradient_checkpointing: recompute activations in the backward pass.

    Errors: ValueError for a prior that this kind cannot be made of, targets that match nothing, and a network that has no
    gradient checkpointing.
    """
    if kind not in get_args(PolicyKind):
        raise ValueError(f"policy kind {kind!r} is unknown; choose one of {', '.join(get_args(PolicyKind))}.")
    if targets and kind != "lora":
        raise ValueError(f"targets name layers for LoRA adapters, and a {kind!r} policy has none; leave them out.")
    recompute = None
    if kind == "full" and len(prior.shape) == 1 and not has_parameters(prior):
        kind = "residual"  # a closed form or a black box on vectors: nothing to copy
    if kind == "full":
        denoiser = trainable_copy(prior)
        network = getattr(denoiser, "model", denoiser)
    elif kind == "residual":
        denoiser = residual_of(prior)
        network = denoiser.residual.model
    else:
        denoiser = add_adapters(prior.denoiser, rank, targets, source=prior.source)
        network, recompute = denoiser.base.model, denoiser.switch.checkpoint
    if gradient_checkpointing:
        _checkpoint(network, recompute)
    return Policy(prior, denoiser)


def has_parameters(prior: Prior) -> bool:
    """Whether the prior's denoiser has anything to train."""
    return isinstance(prior.denoiser, nn.Module) and any(True for _ in prior.denoiser.parameters())


def trainable_copy(prior: Prior) -> nn.Module:
    """A denoiser that starts as an exact copy of the prior and trains all its parameters.

    In evaluation mode, where it stays: dropout would make its log-ratio to the prior a lottery.

    Errors: ValueError where the prior's denoiser has no parameters; wrap it in `ResidualDenoiser` instead.
    """
    if not has_parameters(prior):
        raise ValueError(
            "this prior has no parameters to copy and train; pass policy=ResidualDenoiser(prior.denoiser, network), the"
            " frozen prior plus a network that starts at zero."
        )
    if isinstance(prior.denoiser, DiffusersDenoiser) and prior.denoiser.adapters is not None:
        denoiser = without_adapters(prior.denoiser)
    else:
        denoiser = copy.deepcopy(prior.denoiser)
    return denoiser.requires_grad_(True).eval()


def residual_of(prior: Prior) -> ResidualDenoiser:
    """The frozen prior plus a network of its own kind and size, fresh weights and a zeroed last layer.

    Where the prior has no parameters and its states are vectors, a `residual_network`.

    Errors: ValueError for any other network than a diffusers model.
    """
    base = prior.denoiser
    if len(prior.shape) == 1 and not has_parameters(prior):
        network = cast(nn.Module, residual_network(prior.chain, prior.shape[0]))
        return ResidualDenoiser(base, network.to(prior.device)).eval()
    if not (isinstance(base, DiffusersDenoiser) and is_diffusers(base.model)):
        raise ValueError(
            "this prior is not a diffusers model, so there is no config to build a residual network from; pass"
            " policy=ResidualDenoiser(prior.denoiser, network) with a network of your own."
        )
    with forked_rng():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs as well
        network = cast(Any, type(base.model)).from_config(base.model.config)
    return ResidualDenoiser(base, beside(prior, network))


def beside(prior: Prior, network: nn.Module, guidance: float = 1.0) -> DiffusersDenoiser:
    """A second network run as the prior's own is: its device, dtype, memory format and autocast. guidance: its own scale; a
    residual has none, whose output is added to the guided one."""
    base = prior.denoiser
    weights = list(base.model.parameters())
    network = network.to(weights[0].device)
    if weights[0].dtype != torch.float32:
        network = network.to(weights[0].dtype)
    if any(weight.ndim == 4 and not weight.is_contiguous() for weight in weights):
        network = cast(Any, network).to(memory_format=torch.channels_last)
    return DiffusersDenoiser(network, autocast=base.autocast, guidance=guidance)


def _checkpoint(network: nn.Module, recompute: Callable[..., Any] | None) -> None:
    """Turn gradient checkpointing on, by torch's own function where ``recompute`` is None."""
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(network).__name__} has no gradient checkpointing; leave it off, or lower the chunk (memory_mb) instead."
        )
    network.enable_gradient_checkpointing(recompute)  # pyright: ignore[reportCallIssue]
