"""The decoder of a latent sampler, as the map from states to the images that an energy sees."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..shapes import States

# Latents a decoder's call takes, and pixels: it works at full resolution, where one picture of 512 x 512 takes 1 GB.
DECODE_BATCH, DECODE_PIXELS = 16, 2**18


class LatentDecoder(nn.Module):
    """Latents [B, C, h, w] → images [B, c, H, W] in model space, decoded as the pipelines do: vae.decode(latents / scale)."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        self.config: Any = vae.config
        if self.config.get("latents_mean") is not None:
            raise ValueError(
                "this decoder shifts its latents by a mean of each channel (latents_mean), which is not covered; take a pipeline"
                " whose vae has none."
            )

    def refuse_others(self, channels: int) -> None:
        """Errors: ValueError for latents of other ``channels`` than it takes."""
        if self.config.latent_channels != channels:
            raise ValueError(
                f"the decoder takes latents of {self.config.latent_channels} channels, but the denoiser makes {channels}; they"
                " are not of one pipeline."
            )

    @property
    def factor(self) -> int:
        """Pixels of an image for one of its latents, along a side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def image_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the images of latents of this shape, [C, h, w]."""
        return self.factor * shape[1], self.factor * shape[2]

    @torch.no_grad()
    def forward(self, state: States) -> Float[Tensor, " n *data"]:
        latents = state / self.config.scaling_factor + (self.config.get("shift_factor") or 0.0)
        vae = cast(Any, self.vae)
        fitting = DECODE_PIXELS // (latents.shape[2] * latents.shape[3] * self.factor**2)
        parts = [vae.decode(part).sample for part in torch.split(latents, max(1, min(DECODE_BATCH, fitting)))]
        return torch.cat(parts)
