"""The trainable policy: which kind it is, how it is sampled and saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .condition import Condition, selected
from .denoiser import DiffusersDenoiser, ResidualDenoiser
from .lora import LoraDenoiser
from .prior import Prior
from .rollout import denoise, draw_start
from .shapes import States, Timestep
from .trajectory import rows_at_once

PolicyKind = Literal["full", "lora", "residual"]


class Policy(nn.Module):
    """A trainable denoiser beside the prior whose chain it is run with, in evaluation mode.

    denoiser: what is trained. It says the policy's ``kind``: 'lora' for a `LoraDenoiser` (the prior's own network with adapters
    on), 'residual' for a `ResidualDenoiser` (the prior plus a network), and 'full' for any other, a copy of the prior's network.
    forward: (state, timestep, condition of each state or None) → output.
    """

    def __init__(self, prior: Prior, denoiser: nn.Module) -> None:
        super().__init__()
        self.prior, self.denoiser = prior, denoiser
        self.eval()

    @property
    def kind(self) -> PolicyKind:
        """What sort of network is trained; it follows from the denoiser."""
        if isinstance(self.denoiser, LoraDenoiser):
            return "lora"
        return "residual" if isinstance(self.denoiser, ResidualDenoiser) else "full"

    def forward(self, state: States, timestep: Timestep, condition: Condition | None = None) -> States:
        return self.denoiser(state, timestep, condition)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        condition: Condition | None = None,
        batch: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, " {count} *data"]:
        """Samples as an energy sees them (`Prior.to_data`), ``batch`` at a time (`trajectory.rows_at_once`).

        The law is that of the trained chain, the steps included that belong to the prior. condition: of each sample; those of
        the prior in turn where None. ``on_progress`` receives the number of samples just done. Samples depend on ``seed`` and
        ``batch``.
        """
        prior = self.prior
        batch = rows_at_once(prior.shape, prior.device) if batch is None else batch
        generator = torch.Generator(device=prior.device).manual_seed(seed)
        condition = prior.condition(count) if condition is None else condition
        samples: list[Tensor] = []
        for first in range(0, count, batch):
            state = draw_start(prior, min(batch, count - first), generator)
            rows = slice(first, first + len(state))
            for following in denoise(prior, self, state, generator, selected(condition, rows)):
                state = following
            samples.append(prior.to_data(state))
            if on_progress:
                on_progress(len(state))
        return torch.cat(samples)

    def only(self, row: int) -> Policy:
        """The same policy with this condition of the prior alone; it shares the network."""
        return Policy(self.prior.only(row), self.denoiser)

    def save(self, folder: str | Path) -> None:
        """Write the policy's own weights, safetensors and JSON only, beside a policy.json with the kind, for `load_policy`.

        full: config.json and diffusion_pytorch_model.safetensors, for diffusers' from_pretrained. lora: adapter_config.json and
        adapter_model.safetensors, for peft's PeftModel.from_pretrained. residual: a diffusers model in residual/.

        Errors: ValueError for a network that is no diffusers model; nothing is written then.
        """
        folder = Path(folder)
        if not isinstance(self.denoiser, DiffusersDenoiser | ResidualDenoiser | LoraDenoiser):
            raise ValueError(
                f"a full policy is saved as a diffusers model, and this one's network is a {type(self.denoiser).__name__}; save"
                " its state_dict() yourself."
            )
        self.denoiser.save(folder)
        (folder / "policy.json").write_text(json.dumps({"kind": self.kind}) + "\n")
