"""What a config names, as objects: the device, the prior, the policy at its start, torch's threads. Torch is loaded on use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.prior import PriorConfig
from ..config.run import RunConfig
from .task import Task

if TYPE_CHECKING:
    from ...samplers.loading.text import Prompts
    from ...samplers.policy import Policy
    from ...samplers.prior import Prior


def device_of(config: RunConfig) -> str:
    """Where the networks run.

    Errors: ValueError for a device that torch does not see here.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "cpu": True}  # not mps, which has no float64
    # Under torchrun every process has a GPU of its own.
    names = {"cuda": f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda", "cpu": "cpu"}
    if config.device == "auto":
        return next(names[name] for name, usable in there.items() if usable)
    if not there.get(config.device):
        raise ValueError(f"the device is {config.device!r}, but torch sees none here; use --device auto or cpu.")
    return names[config.device]


def load_prior(config: RunConfig, task: Task | None) -> Prior:
    """The task's prior, or the one at ``config.prior.source``, on the config's device."""
    device = device_of(config)
    if task is not None:
        prior = task.load_prior(config.prior)
        for part in (prior.denoiser, prior.decoder):
            if hasattr(part, "to"):
                part.to(device)
        return prior
    if config.prior.dim is not None or config.prior.seed:
        raise ValueError(f"dim and seed choose a prior of the mixture task; {config.prior.source!r} is as it is, leave them out.")
    assert config.prior.source is not None
    return pretrained_prior(config.prior, config.prior.source, device)


def pretrained_prior(config: PriorConfig, source: str | Path, device: str = "cpu") -> Prior:
    """The sampler in the folder ``source`` with the chain, and the conditions, of the config."""
    from ...samplers.loading.pretrained import load_prior

    settings = asdict(config)
    del settings["source"], settings["chain"], settings["dim"], settings["seed"]  # the last three of shipped tasks alone
    for name in ("prompts", "prompt_metadata", "negative_prompt", "guidance"):
        del settings[name]
    return load_prior(source, device=device, prompts=prompts_of(config), **settings)


def prompts_of(config: PriorConfig) -> Prompts | None:
    """What a text-to-image prior is conditioned on; None for any other."""
    from ...samplers.loading.text import Prompts

    if config.prompts is None:
        return None
    metadata = tuple(json.loads(one) for one in config.prompt_metadata)
    return Prompts(config.prompts, metadata, config.negative_prompt, config.guidance)


def initial_policy(config: RunConfig, prior: Prior) -> Policy:
    """The policy that the config asks for; it starts exactly at ``prior``."""
    from ...samplers.make_policy import make_policy

    chosen = config.policy
    return make_policy(
        prior, chosen.kind, rank=chosen.rank, targets=chosen.targets, gradient_checkpointing=chosen.gradient_checkpointing
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's CPU threads within a block: their number is part of its arithmetic."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
