"""Policies from the folders that `Policy.save` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from ..denoiser import DiffusersDenoiser, ResidualDenoiser
from ..lora import load_adapter
from ..make_policy import beside, has_parameters, residual_of
from ..policy import Policy
from ..prior import Prior
from .folder import load_model, read_json


def load_policy(prior: Prior, folder: str | Path) -> Policy:
    """A policy that `Policy.save` wrote, on the prior that it was made of.

    Errors: ValueError for a folder that holds none, broken weights, and a policy of another prior's network.
    """
    folder = Path(folder)
    kind = read_json(folder / "policy.json").get("kind")
    base = prior.denoiser
    if kind not in ("full", "lora", "residual"):
        raise ValueError(f"{folder}/policy.json names the policy kind {kind!r}; full, lora and residual are known.")
    if kind == "residual" and not has_parameters(prior) and len(prior.shape) == 1:
        return Policy(prior, _beside_no_network(prior, folder / "residual"))
    if not isinstance(base, DiffusersDenoiser):
        raise ValueError("this prior is not a diffusers model, so no saved policy fits it.")
    if kind == "lora":
        return Policy(prior, load_adapter(base, folder, prior.source))
    if kind == "full":
        return load_full(prior, folder)
    network, _ = load_model(folder / "residual", (type(base.model).__name__,), type(base.model))
    residual = residual_of(prior)
    residual.residual = beside(prior, network, guidance=1.0)
    return Policy(prior, residual.requires_grad_(True))


def load_full(prior: Prior, folder: Path) -> Policy:
    """The policy that is a network of the prior's own class and config, as diffusers saves it, in ``folder``.

    Errors: ValueError for broken weights, and for another network.
    """
    base = prior.denoiser
    network, _ = load_model(folder, (type(base.model).__name__,), cast(Any, type(base.model)))
    if _architecture(network) != _architecture(base.model):
        raise ValueError(f"the policy in {folder} is not of this prior's network: their configs differ.")
    return Policy(prior, beside(prior, network, base.guidance).requires_grad_(True))


def _beside_no_network(prior: Prior, folder: Path) -> ResidualDenoiser:
    """The residual network in ``folder`` beside a prior without parameters."""
    denoiser = residual_of(prior)
    network, _ = load_model(folder, ("MLPDenoiser",))
    if _architecture(network) != _architecture(denoiser.residual.model):
        raise ValueError(f"the policy in {folder.parent} is not of this prior's network: their configs differ.")
    denoiser.residual = DiffusersDenoiser(network.to(prior.device))
    return denoiser.requires_grad_(True).eval()


def _architecture(model: Any) -> dict[str, Any]:
    return {key: value for key, value in json.loads(model.to_json_string()).items() if not key.startswith("_")}
