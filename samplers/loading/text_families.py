"""What text-to-image pipelines differ in: their guidance, and what their text encoders give the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..guidance import NEGATIVE

SD3_TOKENS, FLUX_TOKENS = 256, 512  # as their pipelines' own calls have them
Size = tuple[int, int]  # height and width of the decoded images
Inputs = dict[str, Float[Tensor, "prompts ..."]]  # of the network, by the names of its arguments


@dataclass(frozen=True)
class Family:
    """guidance: the scale of the pipeline's own call. encode: (pipeline, prompts, negative, image size) → the network's
    inputs. reads: tokenizers that must take a whole prompt, those of them that a pipeline has; tokens: how many the last of
    them may, where not as many as its encoder takes."""

    guidance: float
    encode: Callable[[Any, list[str], str, Size], Inputs]
    reads: tuple[str, ...] = ("tokenizer",)
    tokens: int | None = None


def _stable_diffusion(pipeline: Any, prompts: list[str], negative: str, size: Size) -> Inputs:
    within, without = pipeline.encode_prompt(prompts, "cpu", 1, True, negative_prompt=[negative] * len(prompts))
    return {"encoder_hidden_states": within, f"{NEGATIVE}encoder_hidden_states": without}


def _stable_diffusion_xl(pipeline: Any, prompts: list[str], negative: str, size: Size) -> Inputs:
    # An empty negative prompt is left out, as the pipeline's config then may ask for zeros.
    others = [negative] * len(prompts) if negative else None
    within, without, pooled, other = pipeline.encode_prompt(
        prompts, device="cpu", do_classifier_free_guidance=True, negative_prompt=others
    )
    sizes = torch.tensor([*size, 0, 0, *size], dtype=within.dtype).repeat(len(prompts), 1)
    return {
        "encoder_hidden_states": within,
        f"{NEGATIVE}encoder_hidden_states": without,
        "added_cond_kwargs.text_embeds": pooled,
        f"{NEGATIVE}added_cond_kwargs.text_embeds": other,
        "added_cond_kwargs.time_ids": sizes,
    }


def _stable_diffusion_3(pipeline: Any, prompts: list[str], negative: str, size: Size) -> Inputs:
    within, without, pooled, other = pipeline.encode_prompt(
        prompts, None, None, device="cpu", do_classifier_free_guidance=True, negative_prompt=[negative] * len(prompts)
    )
    return {
        "encoder_hidden_states": within,
        f"{NEGATIVE}encoder_hidden_states": without,
        "pooled_projections": pooled,
        f"{NEGATIVE}pooled_projections": other,
    }


def _flux(pipeline: Any, prompts: list[str], negative: str, size: Size) -> Inputs:
    within, pooled, _ = pipeline.encode_prompt(prompts, None, device="cpu", max_sequence_length=FLUX_TOKENS)
    return {"encoder_hidden_states": within, "pooled_projections": pooled}


FAMILIES = {
    "StableDiffusionPipeline": Family(7.5, _stable_diffusion),
    "StableDiffusionXLPipeline": Family(5.0, _stable_diffusion_xl, ("tokenizer", "tokenizer_2")),
    "StableDiffusion3Pipeline": Family(7.0, _stable_diffusion_3, ("tokenizer_3",), SD3_TOKENS),
    "FluxPipeline": Family(3.5, _flux, ("tokenizer_2",), FLUX_TOKENS),
}
