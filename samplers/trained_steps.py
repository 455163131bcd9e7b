"""Which steps of a chain are trained: a window of those that can be. It needs no torch, so that a config may read it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chain import Chain


def step_window(text: str) -> tuple[int, int]:
    """'FIRST:LAST' → (first, last), both included and counted from 0.

    Errors: ValueError for any other text, and for a window without steps.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise ValueError(f"train_steps is {text!r}; write FIRST:LAST, such as 10:19, two steps counted from 0.")
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise ValueError(f"train_steps {text} holds no step: LAST is below FIRST, and both are included.")
    return first, last


def with_trained_steps(chain: Chain, first: int, last: int) -> Chain:
    """The same chain, of which only the steps ``first`` to ``last`` (both included, counted from 0) are trained.

    The prior samples as before. A policy is the prior at the other steps, which carry no log-ratio: a smaller class of policies
    toward the same target, at a lower cost. A sliding window of trained steps is the idea of MixGRPO (arXiv 2507.21802).

    Errors: ValueError where there are no such steps, and where one of them cannot be trained.
    """
    window = tuple(range(first, last + 1))
    if not window:
        raise ValueError(f"train_steps {first}:{last} holds no step: LAST is below FIRST, and both are included.")
    if first < 0 or last >= chain.num_steps:
        raise ValueError(
            f"train_steps {first}:{last} reaches beyond the chain, whose {chain.num_steps} steps are 0 (noise) to"
            f" {chain.num_steps - 1} (sample)."
        )
    own = [k for k in window if k not in chain.trained]
    if own:
        why = "draws no noise, so that it has no density to train" if chain.noiseless(own[0]) else "belongs to the prior"
        raise ValueError(
            f"train_steps {first}:{last} holds step {own[0]}, which {why}; of this chain the steps {chain.trained[0]} to"
            f" {chain.last_trained} can be trained."
        )
    return replace(chain, trained=window)


def trained_line(chain: Chain) -> str:
    """What is trained, in a sentence for whoever reads the decisions of a run."""
    first, last = chain.trained[0], chain.last_trained
    steps = f"step {first} of {chain.num_steps} is" if first == last else f"steps {first} to {last} of {chain.num_steps} are"
    return f"{steps} trained; the others are the prior's own"
