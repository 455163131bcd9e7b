"""Text-to-image pipelines: which they are, and their prompts as a table of conditions.

The prompts are encoded once, by the pipeline's own `encode_prompt`, and the text encoders are let go. The target is one law for
each prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..condition import ConditionTable
from ..guidance import NEGATIVE
from ..network_calls import embeds_guidance
from ..prior import Prior
from .folder import TEXT_PIPELINES, UNUSED_PARTS, left_empty, locate, read_json


@dataclass(frozen=True)
class Prompts:
    """texts: one a condition. metadata: what energies are given beside each, {} where there is nothing. negative: the prompt
    of the other half of guidance, "" for none. guidance: its scale, 1 for none; the pipeline's own default where None."""

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...] = ()
    negative: str = ""
    guidance: float | None = None


@dataclass(frozen=True)
class Family:
    """guidance: the scale of the pipeline's own call. encode: (pipeline, prompts, negative, image size) → the network's
    inputs. tokenizer: the one that reads the most of a prompt. tokens: how many, where not as many as the tokenizer says."""

    guidance: float
    encode: Callable[[Any, list[str], str, int], dict[str, Tensor]]
    tokenizer: str = "tokenizer"
    tokens: int | None = None


def _stable_diffusion(pipeline: Any, prompts: list[str], negative: str, size: int) -> dict[str, Tensor]:
    within, without = pipeline.encode_prompt(prompts, "cpu", 1, True, negative_prompt=[negative] * len(prompts))
    return {"encoder_hidden_states": within, f"{NEGATIVE}encoder_hidden_states": without}


def _stable_diffusion_xl(pipeline: Any, prompts: list[str], negative: str, size: int) -> dict[str, Tensor]:
    # An empty negative prompt is left out, as the pipeline's config then may ask for zeros.
    others = [negative] * len(prompts) if negative else None
    within, without, pooled, other = pipeline.encode_prompt(
        prompts, device="cpu", do_classifier_free_guidance=True, negative_prompt=others
    )
    sizes = torch.tensor([size, size, 0, 0, size, size], dtype=within.dtype).repeat(len(prompts), 1)
    return {
        "encoder_hidden_states": within,
        f"{NEGATIVE}encoder_hidden_states": without,
        "added_cond_kwargs.text_embeds": pooled,
        f"{NEGATIVE}added_cond_kwargs.text_embeds": other,
        "added_cond_kwargs.time_ids": sizes,
    }


def _stable_diffusion_3(pipeline: Any, prompts: list[str], negative: str, size: int) -> dict[str, Tensor]:
    within, without, pooled, other = pipeline.encode_prompt(
        prompts, None, None, device="cpu", do_classifier_free_guidance=True, negative_prompt=[negative] * len(prompts)
    )
    return {
        "encoder_hidden_states": within,
        f"{NEGATIVE}encoder_hidden_states": without,
        "pooled_projections": pooled,
        f"{NEGATIVE}pooled_projections": other,
    }


def _flux(pipeline: Any, prompts: list[str], negative: str, size: int) -> dict[str, Tensor]:
    within, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", max_sequence_length=FLUX_TOKENS)
    return {"encoder_hidden_states": within, "pooled_projections": pooled}


SD3_TOKENS, FLUX_TOKENS = 256, 512  # as their pipelines' own calls have them
FAMILIES = {
    "StableDiffusionPipeline": Family(7.5, _stable_diffusion),
    "StableDiffusionXLPipeline": Family(5.0, _stable_diffusion_xl),
    "StableDiffusion3Pipeline": Family(7.0, _stable_diffusion_3, "tokenizer_3", SD3_TOKENS),
    "FluxPipeline": Family(3.5, _flux, "tokenizer_2", FLUX_TOKENS),
}
NAMED = 6  # prompts that a line names one by one


def guidance_of(pipeline: str, network: Any, prompts: Prompts) -> float:
    """The scale that is asked for, or the pipeline's own.

    Errors: ValueError for a negative half of a network that has none.
    """
    if pipeline != "FluxPipeline":
        return FAMILIES[pipeline].guidance if prompts.guidance is None else prompts.guidance
    if prompts.negative:
        raise ValueError(f"{pipeline} has no negative half of its guidance; leave out the negative prompt.")
    if embeds_guidance(network):
        return FAMILIES[pipeline].guidance if prompts.guidance is None else prompts.guidance
    if prompts.guidance not in (None, 1):
        raise ValueError(f"this {pipeline} is without guidance (guidance_embeds is off); leave the scale out.")
    return 1.0


def call_options(pipeline: str, prompts: Prompts, guidance: float) -> dict[str, Any]:
    """What the pipeline's own call takes for these prompts."""
    negative = {} if pipeline == "FluxPipeline" else {"negative_prompt": prompts.negative}
    return {"guidance_scale": guidance, **negative}


@torch.no_grad()
def prompt_table(folder: Path, pipeline: str, network: Any, prompts: Prompts, image_size: int) -> ConditionTable:
    """A row for each prompt, with its embeddings on the CPU. network: the pipeline's unet or transformer, whose config says what
    it takes in place of an encoder that is missing. image_size: height and width of the decoded images.

    Errors: ValueError for a text encoder that cannot be loaded, and a prompt that is longer than it takes.
    """
    loaded = _text_encoders(folder, pipeline, network)
    for text in (*prompts.texts, prompts.negative):
        _refuse_long(loaded, FAMILIES[pipeline], text)
    tensors = FAMILIES[pipeline].encode(loaded, list(prompts.texts), prompts.negative, image_size)
    metadata = prompts.metadata or tuple({} for _ in prompts.texts)
    kept = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    return ConditionTable(prompts.texts, kept, {"prompts": prompts.texts, "metadata": metadata})


def with_prompts(prior: Prior, prompts: Prompts) -> Prior:
    """A text-to-image prior that was loaded from a folder, on other prompts and under their guidance; it shares the network.

    Errors: ValueError for another scale of guidance, which a policy was not trained at, and as `prompt_table`.
    """
    assert prior.source is not None and prior.source.pipeline in FAMILIES
    if guidance_of(prior.source.pipeline, prior.denoiser.model, prompts) != prior.denoiser.guidance:
        raise ValueError(f"the policy is of guidance {prior.denoiser.guidance:g}; leave the scale as it is.")
    image_size = prior.to_data(torch.zeros(1, *prior.shape, device=prior.device)).shape[-1]
    other = copy.copy(prior)
    other.condition_table = prompt_table(
        locate(prior.source.path), prior.source.pipeline, prior.denoiser.model, prompts, image_size
    )
    return other


def _text_encoders(folder: Path, name: str, network: Any) -> Any:
    """The pipeline around ``network`` without the parts that are loaded elsewhere, or not at all."""
    import diffusers
    from diffusers.utils import logging

    parts = read_json(folder / "model_index.json")
    left_out: dict[str, Any] = {**dict.fromkeys(part for part in ("vae", *UNUSED_PARTS) if part in parts), **left_empty(folder)}
    left_out["unet" if "unet" in parts else "transformer"] = network
    if "requires_safety_checker" in parts:
        left_out["requires_safety_checker"] = False
    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return getattr(diffusers, name).from_pretrained(
            folder, **left_out, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # whatever third parties' readers make of a broken folder
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the text encoder of {folder} cannot be loaded: {reason}") from error
    finally:
        if showed:
            logging.enable_progress_bar()


def _refuse_long(pipeline: Any, family: Family, text: str) -> None:
    tokenizer = getattr(pipeline, family.tokenizer) or pipeline.tokenizer
    most = min(tokenizer.model_max_length, family.tokens or tokenizer.model_max_length)
    count = len(tokenizer(text).input_ids)
    if count > most:
        raise ValueError(
            f"the prompt {text[:40]!r}… has {count} tokens, and the text encoder takes {most}, which would cut off its end"
            " unsaid; shorten it."
        )


def refuse_other_prompts(pipeline: str | None, prompts: Prompts | None) -> None:
    """Errors: ValueError for a text-to-image pipeline without prompts, prompts for any other, and guidance below 1."""
    if pipeline in TEXT_PIPELINES and prompts is None:
        raise ValueError(
            f"{pipeline} is text-to-image: name its prompts, --prompts 'a red apple' 'a green pear', or a file of them."
        )
    if pipeline not in TEXT_PIPELINES and prompts is not None:
        raise ValueError(
            f"prompts are for {' and '.join(TEXT_PIPELINES)}, and this is {pipeline or 'a bare model'}; leave them out."
        )
    if prompts is not None and prompts.guidance is not None and not prompts.guidance >= 1:
        raise ValueError(f"guidance is {prompts.guidance:g}; it is 1, for none, or more.")


def prompt_line(prompts: Prompts, guidance: float) -> str:
    """What the loader decided about the prompts, in words."""
    shown = ", ".join(repr(text) for text in prompts.texts[:NAMED])
    more = f" and {len(prompts.texts) - NAMED} more" if len(prompts.texts) > NAMED else ""
    against = f" against {prompts.negative!r}" if prompts.negative else ""
    return f"condition: {shown}{more}, " + (f"guidance {guidance:g}{against}" if guidance != 1 else "without guidance")
