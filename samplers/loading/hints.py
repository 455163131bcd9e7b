"""What a chain loses by its settings, and the flag that mends it: lines below those of what the loader decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, cast

from ..bridge import bridge_of
from ..chain import Chain
from ..schedulers.dispatch import chain_from_scheduler

SHORT = 100  # steps from which on the two variances of DDPM come close
REMEMBERED = 0.1  # share of the start, as `Chain.conditions` judges it
TRAILING = '"timestep_spacing": "trailing" in the scheduler_config.json'
WORTH_IT = 0.7  # of the share, at most, where more steps or other timesteps are proposed


def widest_variance(shape: tuple[int, ...]) -> float:
    """Of data about which nothing else is known: in images the widest direction holds about a tenth of all their variance."""
    return max(1.0, 0.1 * math.prod(shape))


def variance_hint(chain: Chain) -> str | None:
    """DDPM's small variance on a short chain. Its numbers are the ESS of exact denoisers on random mixtures."""
    if not chain.name.startswith("ddpm fixed_small") or chain.num_steps >= SHORT:
        return None
    return (
        f"hint: {chain.name.split()[1]} at K = {chain.num_steps} limits how close a policy can come: --variance fixed_large"
        " raised the ESS of exact denoisers from .13 to .57 at K = 20 (ten dimensions; .72 to .86 at K = 100). It is another"
        " prior, with noisier samples at few steps: look at them first"
    )


def start_hint(chain: Chain, scheduler: Any, shape: tuple[int, ...], **settings: Any) -> str | None:
    """What makes a chain forget its start, by how much: eta or the noise, then more steps or other timesteps. Each is computed.

    settings: the arguments with which `chain_from_scheduler` made the chain.
    """
    variance = widest_variance(shape)
    before = left = chain.remembered_share(variance)
    if before <= REMEMBERED:
        return None
    said: list[str] = []
    flag = _noise_flag(chain, scheduler)
    if flag is not None:
        words, better = flag
        settings = settings | better
        left = chain_from_scheduler(scheduler, chain.num_steps, **settings).remembered_share(variance)
        said.append(f"{words} lowers it to {left:.2g}")
    if left > REMEMBERED:
        found: dict[str, float] = {}
        for words, build in _alternatives(chain, scheduler, settings):
            with suppress(ValueError):  # a chain that does not fit the table, or that cannot be noised back as this one can
                other = build()
                share = other.remembered_share(variance)
                if share < WORTH_IT * left:
                    bridge_of(other)
                    found[words] = share
        if found:
            said.append(", or ".join(f"{words} lowers it to {share:.2g}" for words, share in found.items()))
        left = min([left, *found.values()])
    if left > REMEMBERED:
        said.append("what is left, tiltune sample --exact removes by reweighting")
    return f"hint: the start is remembered (share {before:.2g}): {'; '.join(said)}"


def _noise_flag(chain: Chain, scheduler: Any) -> tuple[str, dict[str, Any]] | None:
    """The flag of this scheduler that adds noise where too little was asked for, and what it sets."""
    if type(scheduler).__name__ == "DDIMScheduler" and chain.name != "ddim eta=1":
        return "--eta 1", {"eta": 1.0}
    if chain.name == "flow flow_grpo":
        return "--noise memoryless", {"noise": "memoryless", "noise_level": 0.7}
    return None


def _alternatives(chain: Chain, scheduler: Any, settings: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Chain]]]:
    """What else may help, in words, and how to build the chain."""
    for steps in (2 * chain.num_steps, 4 * chain.num_steps):
        if steps <= scheduler.config.num_train_timesteps:
            yield f"--steps {steps}", partial(chain_from_scheduler, scheduler, steps, **settings)
    if scheduler.config.get("timestep_spacing", "trailing") != "trailing":
        trailing = cast(Any, type(scheduler)).from_config(scheduler.config, timestep_spacing="trailing")
        yield f"{TRAILING} of a copy of this prior", partial(chain_from_scheduler, trailing, chain.num_steps, **settings)
