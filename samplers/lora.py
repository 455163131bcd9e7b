"""LoRA through peft on the prior's own network: one set of base weights, adapters on for the policy and off for the prior."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from .adapter_switch import AdapterSwitch
from .condition import Condition
from .denoiser import DiffusersDenoiser, is_diffusers
from .loading.folder import read_json
from .prior import Source
from .shapes import AnyShape, States, Timestep
from .typed import forked_rng, named_modules

PREFIX = "base_model.model."  # of peft, before the name of a layer in the network
Layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def peft() -> Any:
    """The library, or a ValueError that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"LoRA policies need peft ({error}); install it with: pip install 'tiltune[lora]'") from error
    return peft


class LoraDenoiser(nn.Module):
    """The prior's own denoiser, run with one adapter on. Its trainable parameters are the adapter's; the rest is frozen.

    source: where the prior was loaded from, for whoever loads the saved adapter; None where it was put together by hand.
    """

    def __init__(self, base: DiffusersDenoiser, name: str, config: Any, source: Source | None = None) -> None:
        super().__init__()
        assert base.adapters is not None
        self.base, self.name, self.config, self.source = base, name, config, source
        self.switch = base.adapters

    def forward(self, state: States, timestep: Timestep, condition: Condition | None = None) -> States:
        with self.switch.using(self.name):
            return self.base.run(state, timestep, condition)

    def layers(self) -> dict[str, nn.Module]:
        """The adapter's peft layers by their names in the network."""
        return _adapted(self.base.model, self.name)

    def adapter_state(self) -> dict[str, AnyShape]:
        """The adapter's weights under the names of peft's own files."""
        return {
            f"{PREFIX}{name}.{part}.weight": getattr(layer, part)[self.name].weight.detach().contiguous()
            for name, layer in self.layers().items()
            for part in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def load_adapter_state(self, state: dict[str, AnyShape]) -> None:
        """Take weights that `adapter_state` gave. Errors: ValueError where names or shapes differ."""
        own = self.adapter_state()
        wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing, foreign or of another shape.")
        for key, weight in own.items():
            weight.copy_(state[key])

    def save(self, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, as peft's PeftModel.from_pretrained(network, folder) reads them."""
        from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

        config = copy.copy(self.config)
        config.target_modules = sorted(config.target_modules)  # a set, in an order that changes from run to run
        config.base_model_name_or_path = None if self.source is None else self.source.path
        config.save_pretrained(str(folder))
        save_file(self.adapter_state(), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def add_adapters(
    denoiser: Any,
    rank: int,
    targets: tuple[str, ...] = (),
    alpha: float | None = None,
    source: Source | None = None,
    *,
    whole_names: bool = False,
) -> LoraDenoiser:
    """Put fresh adapters of ``rank`` into a denoiser's network, in place; they are off until the result is called.

    targets: names of linear or convolutional layers, or endings of such names (``whole_names``: no endings). None given: every
    such layer that is larger than its adapter, attention projections and convolutions among them. alpha: the rank where None. The
    update is alpha / rank · B A x with B = 0 at the start (arXiv 2106.09685, eq. 3), so that the network starts unchanged.
    Adapters of earlier policies on the same network stay as they are and stop being trainable.

    Errors: ValueError for a network that is no diffusers model or has adapters of its own, a rank below 1, targets that
    match nothing, and a missing peft.
    """
    library = peft()
    from peft.tuners.lora import LoraLayer

    if not (isinstance(denoiser, DiffusersDenoiser) and is_diffusers(denoiser.model)):
        raise ValueError("LoRA needs a prior whose network is a diffusers model; a closed form or a black box has no layers.")
    if rank < 1:
        raise ValueError(f"rank is {rank}; adapters have at least rank 1.")
    model = denoiser.model
    if denoiser.adapters is None and any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("this prior's network has peft adapters of its own; merge them into its weights first.")
    alpha = rank if alpha is None else alpha
    config = library.LoraConfig(r=rank, lora_alpha=alpha, target_modules=_choose(model, rank, targets, whole_names))
    switch = AdapterSwitch() if denoiser.adapters is None else denoiser.adapters
    name = f"policy_{len(switch)}"
    model.requires_grad_(False)
    with forked_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second policy on one prior is meant
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs as well
        library.inject_adapter_in_model(config, model, adapter_name=name)
    switch.add(name, list(_adapted(model, name).values()))
    denoiser.adapters = switch
    return LoraDenoiser(denoiser, name, config, source)


def _adapted(model: nn.Module, name: str) -> dict[str, nn.Module]:
    return {key: module for key, module in named_modules(model) if name in getattr(module, "lora_A", ())}


def _choose(model: nn.Module, rank: int, targets: tuple[str, ...], whole_names: bool) -> list[str]:
    """Full names of the layers that get adapters."""
    layers: dict[str, Any] = {
        name.replace(".base_layer", ""): module  # adapted once already, by an earlier policy
        for name, module in named_modules(model)
        if isinstance(module, Layers) and ".lora_" not in name
    }
    if not targets:
        targets = tuple(name for name, layer in layers.items() if _adapter_size(layer, rank) < layer.weight.numel())
        if not targets:
            raise ValueError(f"at rank {rank} an adapter is larger than any layer of this network; lower the rank.")
    chosen: set[str] = set()
    for target in targets:
        found = {name for name in layers if name == target or (not whole_names and name.endswith("." + target))}
        if not found:
            endings = {".".join(name.split(".")[-parts:]) for name in layers for parts in (1, 2)}
            near = get_close_matches(target, sorted(endings | set(layers)), n=3, cutoff=0.3)
            raise ValueError(
                f"the target {target!r} matches no linear or convolutional layer; a name or its ending does"
                f" ({', '.join(near or sorted(endings)[:3])})."
            )
        chosen |= found
    return sorted(chosen)


def _adapter_size(layer: Layers, rank: int) -> int:
    """Parameters of A and B: A takes a layer's whole input (a convolution's patch) to ``rank``, B takes that to its output."""
    return rank * (layer.weight[0].numel() + layer.weight.shape[0])


def without_adapters(denoiser: DiffusersDenoiser, merge: str | None = None) -> DiffusersDenoiser:
    """A copy with plain layers again, the adapter ``merge`` added into their weights (none where None)."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(denoiser)
    plain.adapters, model = None, plain.model
    for name, layer in list(named_modules(model)):
        if isinstance(layer, LoraLayer):
            if merge is not None and merge in layer.lora_A:
                layer.merge(adapter_names=[merge])
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if getattr(model, "_supports_gradient_checkpointing", False):
        model.disable_gradient_checkpointing()  # pyright: ignore[reportCallIssue] - it goes through the switch
    return plain


def load_adapter(denoiser: DiffusersDenoiser, folder: Path, source: Source | None = None) -> LoraDenoiser:
    """The adapter in ``folder``, as `LoraDenoiser.save` or peft wrote it, put into a denoiser's network. peft never sees the
    file of the config.

    Errors: ValueError where it does not fit, and for options of peft that `make_policy` does not set.
    """
    library = peft()
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    rank, alpha, targets = _read_config(folder / "adapter_config.json", library.LoraConfig().to_dict())
    try:
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    try:
        # Before anything of that rank is allocated.
        if {weight.shape[:1] for name, weight in state.items() if ".lora_A." in name} != {(rank,)}:
            raise ValueError(f"its weights are not of rank {rank}.")
        by_pattern = targets is None
        names = layers_of(state) if targets is None else targets
        loaded = add_adapters(denoiser, rank, names, alpha, source, whole_names=by_pattern)
        loaded.load_adapter_state(state)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the adapter in {folder} does not fit this prior's network: {reason}") from error
    return loaded


def layers_of(state: Iterable[str]) -> tuple[str, ...]:
    """The names in the network of the layers that an adapter's weights, under peft's names, are of."""
    return tuple(sorted({name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in state}))


# What an adapter_config.json says of itself, which changes nothing about the adapter.
NOTES = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
OF_TRAINING = ("lora_dropout", "init_lora_weights")  # nor do these, but for beginnings that change the base's weights
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def _read_config(path: Path, defaults: dict[str, Any]) -> tuple[int, float, tuple[str, ...] | None]:
    """(rank, alpha, targets) of an adapter_config.json whose other options are peft's ``defaults``, or off. targets: None where
    they are a pattern; which layers it matched, the weights say."""
    settings = read_json(path)
    kind = settings.pop("peft_type", None)
    rank, alpha, targets = (settings.pop(name, None) for name in ("r", "lora_alpha", "target_modules"))
    if kind != "LORA":
        raise ValueError(f"{path} is of the peft_type {kind!r}; only LORA is covered.")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path} has r = {rank!r}, which is no rank; it must be a whole number of at least 1.")
    if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
        raise ValueError(f"{path} has lora_alpha = {alpha!r}; it must be a positive number.")
    pattern = isinstance(targets, str) and bool(targets)
    if not pattern and not (
        isinstance(targets, list) and targets and all(isinstance(target, str) and target for target in cast("list[Any]", targets))
    ):
        raise ValueError(f"{path} has target_modules = {targets!r}; it must be a list of names of layers.")
    refuse_other_options(settings, defaults, path)
    return rank, alpha, None if pattern else tuple(cast("list[str]", targets))


def refuse_other_options(settings: dict[str, Any], defaults: dict[str, Any], path: Path) -> None:
    """Errors: ValueError for what an adapter says of itself besides rank, alpha and targets, and that changes what it does."""
    start = settings.get("init_lora_weights")
    wrong = {name: settings[name] for name in set(settings) - set(NOTES + OF_TRAINING)}
    found = sorted(name for name, value in wrong.items() if value and value != defaults.get(name))
    if start not in HARMLESS_STARTS:  # PiSSA, OLoRA and others take what they begin with out of the base
        found = ["init_lora_weights"]
    if found:
        raise ValueError(
            f"{path} sets {found[0]} = {settings[found[0]]!r}, which is not covered; merge that adapter into its base in peft and"
            " load the result as a prior, or train one without it."
        )
