"""What an export writes of a text-to-image policy, and the Python that loads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ...samplers.loading.folder import (
    PICKLES,
    TEXT_PARTS,
    TEXT_PIPELINES,
    UNUSED_PARTS,
    left_empty,
    locate,
    weights_variant,
)
from ...samplers.lora import PREFIX, LoraDenoiser
from ...samplers.prior import Prior

ADAPTER = "pytorch_lora_weights.safetensors"  # as a pipeline's load_lora_weights takes it


def is_text(prior: Prior) -> bool:
    """Whether the prior came from a text-to-image pipeline."""
    return prior.source is not None and prior.source.pipeline in TEXT_PIPELINES


def write_text_adapter(denoiser: LoraDenoiser, out: Path) -> None:
    """The adapter once more, under the names of a pipeline's load_lora_weights."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    assert denoiser.source is not None
    own = f"{denoiser.source.denoiser}."
    weights = {name.replace(PREFIX, own): part for name, part in denoiser.adapter_state().items()}
    save_file(weights, out / ADAPTER, metadata={"format": "pt"})


def copy_text_parts(folder: Path, index: dict[str, Any], out: Path) -> None:
    """The parts of the pipeline in ``folder`` that were not trained, as they are but for pickles; ``index`` is told of those that
    no picture needs."""
    pickles = shutil.ignore_patterns(*(f"*{kind}" for kind in PICKLES))
    for part in ("vae", *TEXT_PARTS):
        if index.get(part, [None])[0] is not None:
            shutil.copytree(folder / part, out / part, ignore=pickles)
    index.update({part: [None, None] for part in UNUSED_PARTS if part in index})


def text_usage(prior: Prior, out: Path, *, adapter: bool = False) -> str:
    """Python that loads a text-to-image policy and draws a picture of its first prompt."""
    source, table, scheduler = prior.source, prior.condition_table, type(prior.scheduler).__name__
    assert source is not None and table is not None
    folder, place = locate(source.path), str(out.absolute())
    loaded = str(folder) if adapter else place
    lines = [f"from diffusers import {source.pipeline}, {scheduler}"]
    lines += [f"pipeline = {source.pipeline}.from_pretrained({loaded!r}, use_safetensors=True{_told(folder)})"]
    if adapter:
        lines += [
            f"pipeline.scheduler = {scheduler}.from_pretrained({place!r}, subfolder='scheduler')",
            f"pipeline.load_lora_weights({place!r}, weight_name={ADAPTER!r})  # needs peft",
        ]
    options = "".join(f", {key}={value!r}" for key, value in {**prior.call_options, **prior.step_options}.items())
    call = f"{table.names[0]!r}, num_inference_steps={prior.chain.num_steps}{options}"
    return "\n".join([*lines, f"images = pipeline({call}).images"])


def _told(folder: Path) -> str:
    """What from_pretrained must be told of the folder: parts that it lacks, and the variant that some have alone."""
    encoders = [folder / part for part in TEXT_PARTS if (folder / part / "config.json").is_file()]
    found = {weights_variant(folder / "vae"), *(weights_variant(place, "model") for place in encoders)} - {None}
    missing = "".join(f", {part}=None" for part in left_empty(folder))
    return missing + "".join(f", variant={variant!r}" for variant in sorted(filter(None, found)))
