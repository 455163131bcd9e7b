"""Denoisers: what a network looks like to a chain, and the diffusers models that are made to look so.

A denoiser is ``(state, timestep, condition) -> output``; nothing above it knows the network behind.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .chain import Chain
from .condition import Condition, selected
from .guidance import guided
from .network_calls import call_of, embeds_guidance
from .shapes import Index, States, Steps, Timestep
from .trajectory import rows_at_once

if TYPE_CHECKING:
    from .adapter_switch import AdapterSwitch


class Denoiser(Protocol):
    """(state, timestep, condition of each state or None) → output."""

    def __call__(self, state: States, timestep: Timestep, condition: Condition | None = None) -> States: ...


def evaluate(denoiser: Denoiser, chain: Chain, state: States, step: Steps, condition: Condition | None) -> States:
    """The network's output at a chain's step, in the dtype of ``state`` whatever precision it ran in."""
    output = denoiser(chain.network_input(state, step), chain.timestep(step, state), condition)
    return output.to(state.dtype)


@torch.no_grad()
def evaluate_in_parts(denoiser: Denoiser, chain: Chain, state: States, step: Steps, condition: Condition | None) -> States:
    """`evaluate`, `rows_at_once` states at a time: a large network then takes the memory of few of them."""
    rows = rows_at_once(tuple(state.shape[1:]), state.device)
    if len(state) <= rows:
        return evaluate(denoiser, chain, state, step, condition)
    outputs: list[States] = []
    for first in range(0, len(state), rows):
        place = slice(first, first + rows)
        at = step if isinstance(step, int) else step[place]
        outputs.append(evaluate(denoiser, chain, state[place], at, selected(condition, place)))
    return torch.cat(outputs)


def estimated_data(prior: Denoiser, chain: Chain, state: States, step: Index, condition: Condition | None) -> States:
    """The data as the prior expects them: x_hat at states of steps 0 to K, with a graph; a terminal state is what it is."""
    last = step == chain.num_steps
    if bool(last.all()):
        return state
    before = step.clamp(max=chain.num_steps - 1)
    output = evaluate(prior, chain, state, before, condition)
    return torch.where(last.view(-1, *[1] * (state.ndim - 1)), state, chain.kernel.clean(state, before, output))


class DiffusersDenoiser(nn.Module):
    """A diffusers model (`UNet2DModel`, our `MLPDenoiser`, anything called as model(sample, timestep)) as a denoiser.

    A condition's tensors are passed under their names (``class_labels``). autocast: the dtype of torch's autocast while the
    network runs, or None for its own precision. guidance: the scale w of `guided`, for conditions that have a negative half, or
    what a network that is distilled from guidance is told; 1 for none.

    Where the network carries LoRA adapters (``adapters``), a call runs with all of them off.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None, guidance: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.guidance = guidance
        self.adapters: AdapterSwitch | None = None
        self._network_call, self._embeds_guidance = call_of(model), embeds_guidance(model)

    def forward(self, state: States, timestep: Timestep, condition: Condition | None = None, **inputs: States) -> States:
        with nullcontext() if self.adapters is None else self.adapters.using(None):
            return self.run(state, timestep, condition, **inputs)

    def run(self, state: States, timestep: Timestep, condition: Condition | None = None, **inputs: States) -> States:
        """The network as it stands, with whatever adapters are on; ``inputs`` of its own beside the condition's."""
        named = inputs if condition is None else {**condition.network_inputs(), **inputs}
        if self._embeds_guidance:
            named = {**named, "guidance": state.new_full((len(state),), self.guidance)}
        return guided(self._call, state, timestep, named, 1.0 if self._embeds_guidance else self.guidance)

    def _call(self, state: States, timestep: Timestep, arguments: dict[str, Any]) -> States:
        with torch.autocast(state.device.type, self.autocast) if self.autocast is not None else nullcontext():
            return self._network_call(self.model, state, timestep, arguments)

    def save(self, folder: Path) -> None:
        """config.json and diffusion_pytorch_model.safetensors, for diffusers' from_pretrained.

        Errors: ValueError where the model is none of diffusers.
        """
        if not is_diffusers(self.model):
            raise ValueError(f"{type(self.model).__name__} is no diffusers model; save its state_dict() yourself.")
        self.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]


class ResidualDenoiser(nn.Module):
    """Frozen prior plus a network that starts at zero, for priors that cannot be trained (closed forms, black boxes).

    network: a denoiser or a diffusers model; one with ``sees_prior`` (`MLPDenoiser`) is given the prior's output too. The prior
    is kept out of the module's parameters and state dict: it is frozen and saved elsewhere. The sum is taken in the state's
    precision, so that half precision does not swallow a small residual.
    """

    def __init__(self, prior: Denoiser, network: nn.Module) -> None:
        super().__init__()
        self.residual = as_denoiser(network)
        zero_output_layer_(network.model if isinstance(network, DiffusersDenoiser) else network)
        self._prior: tuple[Denoiser] = (prior,)  # in a tuple, so that it does not register as a submodule

    def forward(self, state: States, timestep: Timestep, condition: Condition | None = None) -> States:
        # Its weights are frozen; at a state that asks for a gradient it has one (`estimated_data`).
        with torch.set_grad_enabled(torch.is_grad_enabled() and state.requires_grad):
            prior = self._prior[0](state, timestep, condition).to(state.dtype)
        sees_prior = isinstance(self.residual, DiffusersDenoiser) and getattr(self.residual.model, "sees_prior", False)
        inputs = {"prior_output": prior} if sees_prior else {}
        return prior + self.residual(state, timestep, condition, **inputs).to(state.dtype)

    def save(self, folder: Path) -> None:
        """The residual network alone as a diffusers model, in residual/.

        Errors: ValueError where it is none.
        """
        if not isinstance(self.residual, DiffusersDenoiser):
            raise ValueError(
                f"a residual policy is saved as a diffusers model, and its network is a {type(self.residual).__name__}; give"
                " ResidualDenoiser a diffusers model (MLPDenoiser, UNet2DModel), or save the state_dict() of its .residual"
                " yourself."
            )
        self.residual.save(folder / "residual")


def zero_output_layer_(network: nn.Module) -> None:
    """Zero the last linear or convolutional layer, in place, so that the network's output is zero.

    Errors: ValueError where the network has no such layer.
    """
    if hasattr(network, "zero_output_"):  # an `MLPDenoiser` has a skip around its last layer
        network.zero_output_()  # pyright: ignore[reportCallIssue]
        return
    convolution = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage] - the base of all convolutions
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | convolution)]
    if not layers:
        raise ValueError(
            f"{type(network).__name__} has no linear or convolutional layer to zero, so a residual policy made of it"
            " would not start at the prior; end it in one."
        )
    with torch.no_grad():
        layers[-1].weight.zero_()
        if layers[-1].bias is not None:
            layers[-1].bias.zero_()


def is_diffusers(network: object) -> bool:
    """Whether an object saves, loads and is called like a diffusers model."""
    return hasattr(network, "save_pretrained") and hasattr(network, "config")


def as_denoiser(network: Any) -> Any:
    """A diffusers model becomes a `DiffusersDenoiser`; what already is a denoiser stays as it is."""
    return DiffusersDenoiser(network) if is_diffusers(network) else network
