"""A trained policy as files that plain diffusers and peft load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ...samplers.loading.folder import (
    DECODERS,
    load_model,
    locate,
    read_json,
    weights_variant,
)
from ...samplers.policy import Policy
from ...samplers.prior import Prior
from ..certificate.deployment import has_even_steps
from .export_text import copy_text_parts, is_text, text_usage, write_text_adapter
from .folder import holds_anything

Format = Literal["pipeline", "lora", "merged"]
FORMATS: dict[str, tuple[str, ...]] = {"full": ("pipeline",), "lora": ("lora", "merged"), "residual": ()}
# A pipeline whose call is this scheduler's plain loop on a network of pixels without a condition.
PLAIN_PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}


def export_policy(policy: Policy, format: Format, out: str | Path, card: str = "") -> str:
    """Write a policy to the new folder ``out``; returns the Python that loads it and samples, also written to README.md there.

    pipeline: a full policy as the denoiser of the pipeline that its prior came from, with the prior's scheduler; merged: the
    same of a LoRA policy, the adapter added into a copy of the base weights. A bare model becomes a DDPMPipeline or a
    DDIMPipeline where its call samples what was trained, else the model with its scheduler in scheduler/. lora: the files
    adapter_config.json and adapter_model.safetensors as peft writes them, the scheduler in scheduler/. Of a text-to-image
    prior the first two write the whole pipeline, whose other parts are copied as they are, and lora also what a pipeline's
    load_lora_weights takes. All weights are safetensors, those that were trained float32.
    card: what README.md says of the training, before the code (`card.model_card`).

    ``out`` appears when it is complete. What is deployed is not the trained chain: the policy runs the last step too where that
    belongs to the prior, and schedulers space steps their own way. `finetune.deployment` measures the difference.

    Errors: ValueError for a format that this policy cannot take, a prior that was put together by hand, and an ``out`` that
    holds anything.
    """
    out = Path(out)
    _check(policy, format, out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        if format == "lora":
            usage = _write_adapter(policy, partial, out)
        else:
            usage = _write_model(policy.prior, _network(policy, format), partial, out)
        (partial / "README.md").write_text(_readme(policy, format, usage, card))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return usage


def _check(policy: Policy, format: str, out: Path) -> None:
    possible = FORMATS[policy.kind]
    if format not in get_args(Format):
        raise ValueError(f"export format {format!r} is unknown; choose one of {', '.join(get_args(Format))}.")
    if not possible:
        raise ValueError(
            "a residual policy is the prior plus a second network, which no class of diffusers is; sample it with tiltune, or"
            " train a full or a LoRA policy of a prior that is a network to export."
        )
    if format not in possible:
        raise ValueError(f"this is a {policy.kind} policy, which cannot be exported as {format!r}; use {' or '.join(possible)}.")
    if policy.prior.source is None or policy.prior.scheduler is None:
        raise ValueError(
            "this policy's prior was put together by hand, so nothing says what scheduler to deploy it with; Policy.save writes"
            " its network, and load_prior makes priors that can be exported."
        )
    if holds_anything(out):
        raise ValueError(f"{out} is not empty, and nothing is overwritten; name a new folder.")


def _network(policy: Policy, format: str) -> nn.Module:
    denoiser: Any = policy.denoiser
    if format == "pipeline":
        return denoiser.model
    from ...samplers.lora import without_adapters

    return without_adapters(denoiser.base, denoiser.name).model


def _write_adapter(policy: Policy, partial: Path, out: Path) -> str:
    from ...samplers.lora import LoraDenoiser

    prior, denoiser = policy.prior, policy.denoiser
    assert isinstance(denoiser, LoraDenoiser)
    policy.save(partial)
    (partial / "policy.json").unlink()
    prior.scheduler.save_pretrained(partial / "scheduler")
    network = denoiser.base.model
    if is_text(prior):
        write_text_adapter(denoiser, partial)
        return text_usage(prior, out, adapter=True)
    return _usage(prior, network, _plain_pipeline(prior, network), out, adapter=True)


def _write_model(prior: Prior, network: Any, partial: Path, out: Path) -> str:
    import diffusers

    source = prior.source
    assert source is not None
    name = _plain_pipeline(prior, network)
    if name:
        getattr(diffusers, name)(unet=network, scheduler=prior.scheduler).save_pretrained(partial)
        return _usage(prior, network, name, out)
    network.save_pretrained(partial / source.denoiser)
    prior.scheduler.save_pretrained(partial / "scheduler")
    if source.pipeline is not None:
        folder = locate(source.path)
        index = read_json(folder / "model_index.json")
        index["scheduler"] = ["diffusers", type(prior.scheduler).__name__]
        index[source.denoiser] = [index[source.denoiser][0], type(network).__name__]
        if is_text(prior):
            copy_text_parts(folder, index, partial)
        else:
            for part in [part for part in ("vae", "vqvae") if part in index]:
                decoder: Any = load_model(folder / part, DECODERS)[0]  # not copied: a pipeline reads no variants by itself
                decoder.save_pretrained(partial / part)
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return text_usage(prior, out) if is_text(prior) else _usage(prior, network, None, out)


def _plain_pipeline(prior: Prior, network: nn.Module) -> str | None:
    """The pipeline whose call is this prior's sampling loop, if diffusers has one."""
    source = prior.source
    assert source is not None
    pixels = type(network).__name__ == "UNet2DModel" and source.pipeline in (None, *PLAIN_PIPELINES.values())
    return PLAIN_PIPELINES.get(type(prior.scheduler).__name__) if pixels and prior.condition_table is None else None


def _usage(prior: Prior, network: Any, pipeline: str | None, out: Path, adapter: bool = False) -> str:
    """Python that loads what was written; where a pipeline's call is the trained chain's loop, that call too."""
    source, scheduler = prior.source, type(prior.scheduler).__name__
    assert source is not None
    kind = type(network).__name__
    library = "tiltune" if kind == "MLPDenoiser" else "diffusers"
    options = "".join(f", {key}={value:g}" for key, value in prior.step_options.items())
    call = f"(batch_size=4, num_inference_steps={prior.chain.num_steps}{options}).images"
    if adapter:
        place = f", subfolder={source.denoiser!r}" if source.denoiser else ""
        variant = weights_variant(locate(source.path) / source.denoiser)
        place += f", variant={variant!r}" if variant else ""
        lines = [
            "import torch",
            f"from {library} import {kind}",
            "from peft import PeftModel",
            f"network = {kind}.from_pretrained({source.path!r}{place}, torch_dtype=torch.float32, use_safetensors=True)",
            f"network = PeftModel.from_pretrained(network, {str(out)!r}).eval()",
            f"from diffusers import {scheduler}",
            f"scheduler = {scheduler}.from_pretrained({str(out)!r}, subfolder='scheduler')",
        ]
        if pipeline:
            lines += [f"from diffusers import {pipeline}", f"images = {pipeline}(network, scheduler){call}"]
    elif pipeline or source.pipeline:
        name = pipeline or source.pipeline
        lines = [f"from diffusers import {name}", f"pipeline = {name}.from_pretrained({str(out)!r}, use_safetensors=True)"]
        lines += [f"images = pipeline{call}"] if pipeline else []
    else:
        lines = [
            f"from {library} import {kind}",
            f"network = {kind}.from_pretrained({str(out)!r}, use_safetensors=True)",
            f"from diffusers import {scheduler}",
            f"scheduler = {scheduler}.from_pretrained({str(out)!r}, subfolder='scheduler')",
        ]
    return "\n".join(lines)


def _readme(policy: Policy, format: str, usage: str, card: str) -> str:
    """What was exported, how it is loaded, and whether that call is the chain that was trained."""
    prior = policy.prior
    notes = [f"Trained as {prior.chain.name}, K = {prior.chain.num_steps}."]
    before = prior.chain.trained[0]
    if before:
        its = "step belongs" if before == 1 else f"{before} steps belong"
        notes += [f"Its first {its} to the prior; deployed, the policy's network is run there too."]
    if prior.chain.prior_last_steps:
        its = "step belongs" if prior.chain.prior_last_steps == 1 else f"{prior.chain.prior_last_steps} steps belong"
        notes += [f"Its last {its} to the prior; deployed, the policy's network is run there too."]
    if not has_even_steps(prior):
        placed = [int(t) for t in prior.chain.timesteps.tolist()]
        notes += [f"Its timesteps were placed; a pipeline spaces them evenly instead: {placed}."]
    if type(prior.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not prior.scheduler.config.stochastic_sampling:
        notes += ["diffusers runs this flow without the noise that it was trained with."]
    notes += ["`tiltune evaluate` measures what samplers other than the trained chain lose."]
    decided = "\n".join(f"- {line}" for line in prior.decisions)
    title = f"# A {policy.kind} policy as {format}, by tiltune"
    return "\n\n".join([*([card, f"#{title}"] if card else [title]), f"```python\n{usage}\n```", " ".join(notes), decided]) + "\n"
