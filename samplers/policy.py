"""The trainable policy: what it is made of, how it is sampled and saved. `Prior` and denoisers are importable from here too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, DiffusersDenoiser, ResidualDenoiser, as_denoiser, evaluate, is_diffusers
from .prior import Prior, Source

__all__ = [
    "Denoiser",
    "DiffusersDenoiser",
    "Policy",
    "PolicyKind",
    "Prior",
    "ResidualDenoiser",
    "Source",
    "as_denoiser",
    "evaluate",
    "make_policy",
    "trainable_copy",
]

PolicyKind = Literal["full", "lora", "residual"]


class Policy(nn.Module):
    """A trainable denoiser beside the prior whose chain it is run with, in evaluation mode.

    kind: 'full' a copy, 'lora' the prior's own network with adapters on, 'residual' the prior plus a network.
    forward: state [N, ...], timestep [] or [N], condition [N, ...] or None → output, the shape of ``state``.
    """

    def __init__(self, prior: Prior, denoiser: nn.Module, kind: PolicyKind) -> None:
        super().__init__()
        self.prior, self.denoiser, self.kind = prior, denoiser, kind
        self.eval()

    def forward(self, state: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.denoiser(state, timestep, condition)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        batch: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """[count, ...] samples as an energy sees them (`Prior.to_data`), ``batch`` at a time (`trajectory.rows_at_once`).

        The law is that of the trained chain, the prior's last steps included where they are a decoder. ``on_progress`` receives
        the number of samples just done. Samples depend on ``seed`` and ``batch``.
        """
        from .rollout import decoded
        from .trajectory import rows_at_once

        prior, chain = self.prior, self.prior.chain
        batch = rows_at_once(prior.shape, prior.device) if batch is None else batch
        generator = torch.Generator(device=prior.device).manual_seed(seed)
        samples = []
        for first in range(0, count, batch):
            shape = (min(batch, count - first), *prior.shape)
            state = chain.start_std * torch.randn(shape, generator=generator, device=prior.device)
            # A rollout without the prior's half of the work, which only log-ratios need.
            for step in range(chain.num_kernels):
                noise = torch.randn(shape, generator=generator, device=prior.device)
                mean = chain.mean(state, step, evaluate(self, chain, state, step, None))
                state = mean + chain.row(step, state).sigma * noise
            *_, state = state, *decoded(prior, state, generator)
            samples.append(prior.to_data(state))
            if on_progress:
                on_progress(shape[0])
        return torch.cat(samples)

    def save(self, folder: str | Path) -> None:
        """Write the policy's own weights, safetensors and JSON only, for `pretrained.load_policy`.

        Errors: ValueError for a network that is no diffusers model.
        """
        from .loading.pretrained import save_policy

        save_policy(self, Path(folder))


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
    random do so from a fixed seed. gradient_checkpointing: recompute activations in the backward pass.

    Errors: ValueError for a prior that this kind cannot be made of, targets that match nothing, and a network that has no
    gradient checkpointing.
    """
    if kind not in get_args(PolicyKind):
        raise ValueError(f"policy kind {kind!r} is unknown; choose one of {', '.join(get_args(PolicyKind))}.")
    if targets and kind != "lora":
        raise ValueError(f"targets name layers for LoRA adapters, and a {kind!r} policy has none; leave them out.")
    recompute = None
    if kind == "full":
        denoiser = trainable_copy(prior)
        network = getattr(denoiser, "model", denoiser)
    elif kind == "residual":
        denoiser = residual_of(prior)
        network = denoiser.residual.model
    else:
        from .lora import add_adapters

        denoiser = add_adapters(prior.denoiser, rank, targets)
        network, recompute = denoiser.base.model, denoiser.switch.checkpoint
    if gradient_checkpointing:
        _checkpoint(network, recompute)
    return Policy(prior, denoiser, kind)


def trainable_copy(prior: Prior) -> nn.Module:
    """A denoiser that starts as an exact copy of the prior and trains all its parameters.

    In evaluation mode, where it stays: dropout would make its log-ratio to the prior a lottery.

    Errors: ValueError where the prior's denoiser has no parameters; wrap it in `ResidualDenoiser` instead.
    """
    if not isinstance(prior.denoiser, nn.Module) or not any(True for _ in prior.denoiser.parameters()):
        raise ValueError(
            "this prior has no parameters to copy and train; pass policy=ResidualDenoiser(prior.denoiser, network), the"
            " frozen prior plus a network that starts at zero."
        )
    if isinstance(prior.denoiser, DiffusersDenoiser) and prior.denoiser.adapters is not None:
        from .lora import without_adapters

        denoiser = without_adapters(prior.denoiser)
    else:
        denoiser = copy.deepcopy(prior.denoiser)
    return denoiser.requires_grad_(True).eval()


def residual_of(prior: Prior) -> ResidualDenoiser:
    """The frozen prior plus a network of its own kind and size, fresh weights and a zeroed last layer."""
    base = prior.denoiser
    if not (isinstance(base, DiffusersDenoiser) and is_diffusers(base.model)):
        raise ValueError(
            "this prior is not a diffusers model, so there is no config to build a residual network from; pass"
            " policy=ResidualDenoiser(prior.denoiser, network) with a network of your own."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs as well
        network = type(base.model).from_config(base.model.config)  # pyright: ignore[reportAttributeAccessIssue]
    return ResidualDenoiser(base, beside(prior, network))


def beside(prior: Prior, network: nn.Module) -> DiffusersDenoiser:
    """A second network run as the prior's own is: its device, dtype, memory format, label and autocast."""
    base = prior.denoiser
    weights = list(base.model.parameters())
    network = network.to(weights[0].device)
    if weights[0].dtype != torch.float32:
        network = network.to(weights[0].dtype)
    if any(weight.ndim == 4 and not weight.is_contiguous() for weight in weights):
        network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return DiffusersDenoiser(network, label=base.label, autocast=base.autocast)


def _checkpoint(network: nn.Module, recompute: Callable[..., Any] | None) -> None:
    """Turn gradient checkpointing on, by torch's own function where ``recompute`` is None."""
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(network).__name__} has no gradient checkpointing; leave it off, or lower the chunk (memory_mb) instead."
        )
    network.enable_gradient_checkpointing(recompute)  # pyright: ignore[reportCallIssue]
