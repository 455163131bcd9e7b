"""What a chain must know of a diffusers network: the shape of a state and the classes it is conditioned on, from its config."""

from __future__ import annotations

from typing import Any

from torch import nn


def state_shape(model: Any) -> tuple[int, ...]:
    """The shape of one state."""
    config, name = model.config, type(model).__name__
    if name == "MLPDenoiser":
        return (config.dim,)
    inward = config.in_channels
    outward = inward if config.out_channels is None else config.out_channels
    if outward != inward and not (name == "DiTTransformer2DModel" and outward == 2 * inward):
        learned = " (a learned variance, which policy and prior would not share)" if outward == 2 * inward else ""
        raise ValueError(f"{name} takes {inward} channels and gives {outward}{learned}; a chain needs as many out as in.")
    if config.sample_size is None:
        raise ValueError(f"this {name} has no sample_size in its config.json; write the height and width that it samples there.")
    size = config.sample_size
    return (inward, size, size) if isinstance(size, int) else (inward, *size)


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


def check_label(model: nn.Module, label: int | None) -> None:
    classes = num_classes(model)
    if classes is None and label is not None:
        raise ValueError(f"label={label} was given, but this {type(model).__name__} is unconditional; leave it out.")
    if classes is not None and (label is None or not 0 <= label < classes):
        given = "none was given" if label is None else f"{label} was given"
        raise ValueError(f"this {type(model).__name__} is class-conditional: give a label from 0 to {classes - 1} ({given}).")
