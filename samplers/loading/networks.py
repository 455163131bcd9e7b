"""What a chain must know of a diffusers network: the shape of a state and the classes it is conditioned on, from its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..condition import ConditionTable
from .latent_decoder import LatentDecoder

FLUX_SIDE = 128  # of latents, which its pipeline has where nobody asks


def state_shape(model: Any, side: int | None = None) -> tuple[int, ...]:
    """The shape of one state. side: height and width, where they are not the config's own.

    Errors: ValueError for a network whose states have no shape of their own, or that is no step of a chain.
    """
    config, name = model.config, type(model).__name__
    if name == "MLPDenoiser":
        return (config.dim,)
    if name == "FluxTransformer2DModel":  # patches of 2 x 2
        side = FLUX_SIDE if side is None else side
        return (config.in_channels // 4, side, side)
    inward = config.in_channels
    outward = inward if config.out_channels is None else config.out_channels
    if outward != inward and not (name == "DiTTransformer2DModel" and outward == 2 * inward):
        learned = " (a learned variance, which policy and prior would not share)" if outward == 2 * inward else ""
        raise ValueError(f"{name} takes {inward} channels and gives {outward}{learned}; a chain needs as many out as in.")
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"this {name} is distilled from guidance (time_cond_proj_dim), and its few steps are no chain of small kernels; take"
            " the model that it was distilled from."
        )
    if side is not None:
        return (inward, side, side)
    if config.sample_size is None:
        raise ValueError(f"this {name} has no sample_size in its config.json; write the height and width that it samples there.")
    size = config.sample_size
    return (inward, size, size) if isinstance(size, int) else (inward, *size)


def latent_side(image_size: int | None, decoder: LatentDecoder | None, model: Any) -> int | None:
    """Height and width of latents for images of this size; None where it is the model's own.

    Errors: ValueError for a size that latents cannot make, or of a prior that is no latent one.
    """
    if image_size is None:
        return None
    if decoder is None:
        raise ValueError(f"image_size is for priors of latents, and this {type(model).__name__} has none; leave it out.")
    patch = 2 if type(model).__name__ == "FluxTransformer2DModel" else 1
    if image_size < 1 or image_size % (patch * decoder.factor):
        raise ValueError(f"image_size is {image_size}; this prior makes multiples of {patch * decoder.factor} pixels.")
    return image_size // decoder.factor


def num_classes(model: Any) -> int | None:
    """Number of class labels of a class-conditional model, the class-free one of a DiT included; None without a condition."""
    config, name = model.config, type(model).__name__
    if name == "DiTTransformer2DModel":
        return config.num_embeds_ada_norm + 1
    if name == "UNet2DModel" and config.class_embed_type is not None:
        raise ValueError(
            f"this UNet2DModel's condition is of type {config.class_embed_type!r}; class labels from a table (num_class_embeds)"
            " are covered."
        )
    return config.num_class_embeds if name == "UNet2DModel" else None


def label_table(model: nn.Module, labels: Sequence[int] | Literal["all"] | None) -> ConditionTable | None:
    """A row for each of these class labels; all: every one of the network's but a DiT's class-free one. None: unconditional.

    Errors: ValueError for labels that the network does not have, and where it is conditioned and none are given.
    """
    classes, name = num_classes(model), type(model).__name__
    if classes is None:
        if labels is not None:
            raise ValueError(f"labels were given, but this {name} is unconditional; leave them out.")
        return None
    if labels == "all":
        labels = range(classes - 1 if name == "DiTTransformer2DModel" else classes)
    wrong = [label for label in labels or () if not 0 <= label < classes]
    if not labels or wrong:
        given = f"{wrong[0]} was given" if wrong else "none were given"
        raise ValueError(f"this {name} is class-conditional: give labels from 0 to {classes - 1}, or all of them ({given}).")
    return ConditionTable(tuple(f"label {label}" for label in labels), {"class_labels": torch.tensor(list(labels))})
