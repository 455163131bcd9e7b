"""The prompts of a text-to-image prior as a table of conditions, each with a law of its own.

They are encoded once, by the pipeline's own `encode_prompt`, and the text encoders are let go.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..condition import ConditionTable
from ..guidance import NEGATIVE
from ..network_calls import embeds_guidance
from ..prior import Prior
from .folder import TEXT_DENOISERS, TEXT_PIPELINES, Layout, locate, read_json
from .text_encoders import text_encoders
from .text_families import FAMILIES, Family, Size

AT_ONCE = 16  # prompts: an encoder keeps all of its hidden states
NAMED = 6  # prompts that a line names one by one


@dataclass(frozen=True)
class Prompts:
    """texts: one a condition. metadata: what energies are given beside each, {} where there is nothing. negative: the prompt
    of the other half of guidance, "" for none. guidance: its scale, 1 for none; the pipeline's own default where None."""

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...] = ()
    negative: str = ""
    guidance: float | None = None


def guidance_of(pipeline: str, network: Any, prompts: Prompts) -> float:
    """The scale that is asked for, or the pipeline's own.

    Errors: ValueError for one that is none, and for a negative half of a network that has none.
    """
    wanted = prompts.guidance
    if wanted is not None and not 1 <= wanted < math.inf:
        raise ValueError(f"guidance is {wanted:g}; it is 1, for none, or more.")
    if pipeline == "FluxPipeline" and prompts.negative:
        raise ValueError(f"{pipeline} has no negative half of its guidance; leave out the negative prompt.")
    if pipeline == "FluxPipeline" and not embeds_guidance(network):
        if wanted not in (None, 1):
            raise ValueError(f"this {pipeline} is without guidance (guidance_embeds is off); leave the scale out.")
        return 1.0
    return FAMILIES[pipeline].guidance if wanted is None else wanted


def call_options(prompts: Prompts, guidance: float) -> dict[str, Any]:
    """What the pipeline's own call takes for these prompts. An empty negative prompt is none: SDXL has zeros for it."""
    return {"guidance_scale": guidance, **({"negative_prompt": prompts.negative} if prompts.negative else {})}


@torch.no_grad()
def prompt_table(folder: Path, pipeline: str, network: Any, prompts: Prompts, size: Size, device: Any = "cpu") -> ConditionTable:
    """A row for each prompt, with its embeddings on ``device``. network: the pipeline's unet or transformer, whose config says
    what it takes in place of an encoder that is missing. size: of the decoded images.

    Errors: ValueError for a text encoder that cannot be loaded, and a prompt that is longer than it takes.
    """
    family, count = FAMILIES[pipeline], len(prompts.texts)
    with text_encoders(folder, pipeline, network) as loaded:
        for text in (*prompts.texts, prompts.negative):
            _refuse_long(loaded, family, text)
        parts = [prompts.texts[first : first + AT_ONCE] for first in range(0, count, AT_ONCE)]
        encoded = [family.encode(loaded, list(part), prompts.negative, size) for part in parts]
    # Without guidance the other half is never run: no step need gather it.
    names = [name for name in encoded[0] if prompts.guidance != 1 or not name.startswith(NEGATIVE)]
    tensors = {name: torch.cat([one[name] for one in encoded]).float().to(device) for name in names}
    for name, tensor in tensors.items():
        if name.startswith(NEGATIVE):  # the same of all prompts
            tensors[name] = tensor[:1].expand_as(tensor)
    metadata = prompts.metadata or tuple({} for _ in prompts.texts)
    return ConditionTable(prompts.texts, tensors, {"prompts": prompts.texts, "metadata": metadata})


def with_prompts(prior: Prior, prompts: Prompts) -> Prior:
    """A text-to-image prior that was loaded from a folder, on other prompts and under their guidance; it shares the network.

    Errors: ValueError for another scale of guidance, which a policy was not trained at, and as `prompt_table`.
    """
    assert prior.source is not None and prior.source.pipeline in TEXT_PIPELINES
    network, pipeline = prior.denoiser.model, prior.source.pipeline
    if guidance_of(pipeline, network, prompts) != prior.denoiser.guidance:
        raise ValueError(f"the policy is of guidance {prior.denoiser.guidance:g}; leave the scale as it is.")
    size = prior.decoder.image_size(prior.shape)
    other = copy.copy(prior)
    other.condition_table = prompt_table(locate(prior.source.path), pipeline, network, prompts, size, prior.device)
    return other


def _refuse_long(pipeline: Any, family: Family, text: str) -> None:
    """By each tokenizer that must take the whole prompt; by the first where the pipeline has none of them."""
    for name in [name for name in family.reads if getattr(pipeline, name, None) is not None] or ["tokenizer"]:
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
        most = getattr(encoder.config, "max_position_embeddings", None) or family.tokens
        most = min(most, getattr(pipeline, name).model_max_length, family.tokens or most)
        count = len(getattr(pipeline, name)(text, verbose=False).input_ids)
        if count > most:
            raise ValueError(
                f"the prompt {text[:40]!r}… has {count} tokens, and the text encoder takes {most}, which would cut off its end"
                " unsaid; shorten it."
            )


def refuse_other_prompts(pipeline: str | None, prompts: Prompts | None) -> None:
    """Errors: ValueError for a text-to-image pipeline without prompts, and prompts for any other prior."""
    if pipeline in TEXT_PIPELINES and prompts is None:
        raise ValueError(
            f"{pipeline} is text-to-image: name its prompts, --prompts 'a red apple' 'a green pear', or a file of them."
        )
    if pipeline not in TEXT_PIPELINES and prompts is not None:
        raise ValueError(
            f"prompts are for {', '.join(TEXT_PIPELINES)}, and this is {pipeline or 'a bare model'}; leave them out."
        )


def refuse_without_text(layout: Layout) -> None:
    """Errors: ValueError for a network that takes embeddings of text, outside of a pipeline that makes them."""
    name = read_json(layout.denoiser / "config.json").get("_class_name")
    if name in TEXT_DENOISERS and layout.pipeline not in TEXT_PIPELINES:
        raise ValueError(
            f"{layout.denoiser} is a {name}, which needs the text encoders of its pipeline; give the folder of the whole"
            f" pipeline, one of {', '.join(TEXT_PIPELINES)}."
        )


def prompt_line(prompts: Prompts, guidance: float) -> str:
    """What the loader decided about the prompts, in words."""
    shown = ", ".join(repr(text) for text in prompts.texts[:NAMED])
    more = f" and {len(prompts.texts) - NAMED} more" if len(prompts.texts) > NAMED else ""
    against = f" against {prompts.negative!r}" if prompts.negative else ""
    return f"condition: {shown}{more}, " + (f"guidance {guidance:g}{against}" if guidance != 1 else "without guidance")
