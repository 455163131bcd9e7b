"""How networks of each class are called: (network, state, timestep, arguments by name) → output, whatever their signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange

from .shapes import States, Timestep

Call = Callable[[Any, States, Timestep, dict[str, Any]], States]


def call_of(network: Any) -> Call:
    """The call of a network's class; of any that is not named here, that of the pipelines of images."""
    if getattr(getattr(network, "config", None), "time_embedding_type", None) == "learned":
        return _integer_timestep
    return CALLS.get(type(network).__name__, _plain)


def embeds_guidance(network: Any) -> bool:
    """Whether a network is distilled from guidance: it takes the scale as an argument, and there is no negative half."""
    return bool(getattr(getattr(network, "config", None), "guidance_embeds", False))


def _plain(network: Any, state: States, timestep: Timestep, arguments: dict[str, Any]) -> States:
    return network(state, timestep, return_dict=False, **arguments)[0]


def _integer_timestep(network: Any, state: States, timestep: Timestep, arguments: dict[str, Any]) -> States:
    """A table of timesteps takes integers only."""
    return _plain(network, state, timestep.long(), arguments)


def _dit(network: Any, state: States, timestep: Timestep, arguments: dict[str, Any]) -> States:
    """No scalar timestep. The second half of twice as many output channels is a learned variance, which its pipeline leaves
    out."""
    output = _plain(network, state, timestep.expand(len(state)), arguments)
    channels = state.shape[1]
    return output[:, :channels] if output.shape[1] == 2 * channels else output


def _stable_diffusion_3(network: Any, state: States, timestep: Timestep, arguments: dict[str, Any]) -> States:
    return network(hidden_states=state, timestep=timestep.expand(len(state)), return_dict=False, **arguments)[0]


def _flux(network: Any, state: States, timestep: Timestep, arguments: dict[str, Any]) -> States:
    """Latents as a sequence of 2 x 2 patches, each with its place; timesteps in [0, 1]."""
    height, width = state.shape[2] // 2, state.shape[3] // 2
    places = torch.zeros(height, width, 3, device=state.device, dtype=state.dtype)
    places[..., 1] += torch.arange(height, device=state.device)[:, None]
    places[..., 2] += torch.arange(width, device=state.device)
    words = torch.zeros(arguments["encoder_hidden_states"].shape[1], 3, device=state.device, dtype=state.dtype)
    output = network(
        hidden_states=rearrange(state, "b c (h y) (w x) -> b (h w) (c y x)", y=2, x=2),
        timestep=timestep.expand(len(state)).to(state.dtype) / 1000,
        img_ids=rearrange(places, "h w place -> (h w) place"),
        txt_ids=words,
        return_dict=False,
        **arguments,
    )[0]
    return rearrange(output, "b (h w) (c y x) -> b c (h y) (w x)", h=height, y=2, x=2)


CALLS: dict[str, Call] = {
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _stable_diffusion_3,
    "FluxTransformer2DModel": _flux,
}
