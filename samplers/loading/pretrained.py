"""Pretrained diffusers samplers as priors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..chain import Chain
from ..condition import ConditionTable
from ..denoiser import DiffusersDenoiser
from ..prior import Prior, Source
from ..schedulers.dispatch import chain_from_scheduler
from ..trained_steps import step_window, trained_line, with_trained_steps
from .flux_schedule import flux_schedule
from .folder import DECODERS, DENOISERS, Layout, load_model, locate, read_layout
from .hints import start_hint, variance_hint
from .latent_decoder import LatentDecoder
from .networks import label_table, latent_side, num_classes, state_shape
from .scheduler import refuse_unused, scheduler_of
from .text import Prompts, call_options, guidance_of, prompt_line, prompt_table, refuse_other_prompts, refuse_without_text

NAMED = 12  # conditions that a line names one by one
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_prior(
    path: str | Path,
    steps: int = 50,
    *,
    eta: float = 1.0,
    variance: Literal["fixed_large", "fixed_small"] | None = None,
    noise: Literal["memoryless", "flow_grpo"] = "memoryless",
    noise_level: float = 0.7,
    train_steps: str | None = None,
    labels: Sequence[int] | Literal["all"] | None = None,
    scheduler: Literal["ddpm", "ddim", "euler_ancestral"] | None = None,
    prompts: Prompts | None = None,
    image_size: int | None = None,
    precision: Literal["float32", "bf16", "fp16"] = "float32",
    channels_last: bool = False,
    device: torch.device | str | None = None,
) -> Prior:
    """A pretrained sampler run with ``steps`` steps of its own scheduler.

    path: a pipeline folder (DDPMPipeline, DDIMPipeline, LDMPipeline, DiTPipeline and their like: one unet or transformer, one
    scheduler, at most one vae; and the text-to-image ones of `folder.TEXT_PIPELINES`), a bare model's folder with a
    scheduler_config.json beside it or in scheduler/, or the hub id of a pipeline where no such folder exists.
    eta: DDIM's noise. variance: DDPM's, in place of the scheduler's own. noise, noise_level: what makes a flow stochastic.
    train_steps: 'FIRST:LAST', the only steps that a policy changes (`with_trained_steps`); None: all that can be trained.
    labels: the classes of a class-conditional model, run without guidance, each with a law of its own; or all. scheduler: one
    in place of the folder's, with its betas and prediction. prompts: of a text-to-image pipeline, each with a law of its own,
    under guidance. image_size: height and width of a latent prior's pictures, in pixels; its own where None. precision: autocast
    of the networks; weights, states and log-ratios are float32.

    Energies see samples in the model's space, [-1, 1] nominal and not clamped: a DDPMPipeline's images are
    (sample / 2 + 0.5).clamp(0, 1) of them. Latents are decoded first, without a graph, `latent_decoder.DECODE_BATCH` at a time.

    Errors: ValueError, one sentence, for whatever does not fit.
    """
    layout = read_layout(locate(path))
    refuse_other_prompts(layout.pipeline, prompts)
    refuse_without_text(layout)
    model, stored = load_model(layout.denoiser, DENOISERS)
    to_data = None if layout.decoder is None else LatentDecoder(load_model(layout.decoder, DECODERS)[0])
    shape = state_shape(model, latent_side(image_size, to_data, model))
    if to_data is not None:
        to_data.refuse_others(shape[0])
    run_by = scheduler_of(layout, scheduler, variance)
    run_by, timesteps = flux_schedule(run_by, shape, steps) if layout.pipeline == "FluxPipeline" else (run_by, None)
    refuse_unused(run_by, eta, noise, noise_level)
    count = steps if timesteps is None else None
    chain = chain_from_scheduler(run_by, count, timesteps=timesteps, eta=eta, noise=noise, noise_level=noise_level)
    chain = chain if train_steps is None else with_trained_steps(chain, *step_window(train_steps))
    if prompts is None:
        table, guidance, call = label_table(model, labels), 1.0, {}
    else:
        assert layout.pipeline is not None and to_data is not None
        if labels is not None:
            raise ValueError(f"labels were given, but {layout.pipeline} is conditioned on prompts; leave them out.")
        guidance = guidance_of(layout.pipeline, model, prompts)
        size = to_data.image_size(shape)
        table = prompt_table(layout.folder, layout.pipeline, model, prompts, size, device or "cpu")
        call = call_options(prompts, guidance)
    autocast = _autocast(precision)
    if channels_last:
        _channels_last(model, shape)
    decisions = (
        _prior_line(layout, model, stored, precision, shape, to_data),
        _chain_line(chain, run_by),
        None if train_steps is None else trained_line(chain),
        _condition_line(model, table) if prompts is None else prompt_line(prompts, guidance),
        None if variance is not None else variance_hint(chain),
        start_hint(chain, run_by, shape, eta=eta, noise=noise, noise_level=noise_level),
    )
    return Prior(
        DiffusersDenoiser(model.to(device or "cpu"), autocast=autocast, guidance=guidance),
        chain,
        shape,
        None if to_data is None else to_data.to(device or "cpu"),
        condition_table=table,
        source=_source(path, layout),
        scheduler=run_by,
        step_options={"eta": eta} if type(run_by).__name__ == "DDIMScheduler" else {},
        call_options=call,
        decisions=tuple(line for line in decisions if line is not None),
    )


def _autocast(precision: str) -> torch.dtype | None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision]


def _channels_last(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Set the memory format of a convolutional network, in place."""
    if len(shape) != 3:
        raise ValueError(f"channels_last is for convolutional networks, and {type(model).__name__} has no images.")
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _source(path: str | Path, layout: Layout) -> Source:
    known = layout.folder if Path(path).expanduser().is_dir() else path
    return Source(str(known), layout.pipeline, "" if layout.pipeline is None else layout.denoiser.name)


def _prior_line(
    layout: Layout, model: nn.Module, stored: str, precision: str, shape: tuple[int, ...], to_data: LatentDecoder | None
) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    of = f" of {layout.pipeline}" if layout.pipeline else ""
    run = f"{stored} weights held in float32" if stored != "float32" else "float32 weights"
    run += "" if precision == "float32" else f", run in {precision} autocast"
    seen = "seen by the energy as they are" if to_data is None else f"decoded by {type(to_data.vae).__name__} before the energy"
    size = f"{count / 1e6:.3g}M" if count >= 1e5 else str(count)
    shown = " x ".join(map(str, shape))
    return f"prior: {type(model).__name__}{of}, {size} parameters, {run}, {layout.folder}; states {shown}, {seen}"


def _chain_line(chain: Chain, scheduler: Any) -> str:
    kind = getattr(scheduler.config, "prediction_type", "flow")
    clip = "x_hat not clipped" if chain.clip is None else f"x_hat clipped to ±{chain.clip:g}"
    return f"chain: {chain.name}, K = {chain.num_steps}, {kind}, {clip}; {chain.conditions()['last_step']}"


def _condition_line(model: Any, table: ConditionTable | None) -> str:
    classes = num_classes(model)
    if classes is None or table is None:
        return "condition: none"
    names = ", ".join(table.names) if len(table) <= NAMED else f"{len(table)} labels"
    line = f"condition: {names} of 0 to {classes - 1}, without guidance"
    if type(model).__name__ == "DiTTransformer2DModel":
        line += f" ({classes - 1} is class-free)"
        if model.out_channels == 2 * model.config.in_channels:
            line += "; the learned variance channels are left out, as DiTPipeline does"
    return line
