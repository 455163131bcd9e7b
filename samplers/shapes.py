"""The names of dimensions in signatures, and the few types that stand in many of them.

    batch        trajectories of a batch
    n            rows: states of any steps of any trajectories, or one value for each
    m            rows of a second set, those of the prior beside those of the policy
    steps        K, the steps of a chain
    states       K + 1, the states of a trajectory; 1 where only the terminal one is kept
    kernels      num_kernels, the trained steps
    conditions   G, the rows of a table of conditions
    *state       the shape of one state
    *data        the shape of one sample, as an energy sees it
    _            a size that nothing else has to agree with; ... any shape
    {count}      the value of the argument ``count``

A name that stands twice in one signature means that both sizes agree. Every string begins with a space, which stops linters
from parsing it as code. Nothing is checked when a program runs. The tests check small runs of
everything, and every call with ``pytest --check-shapes``.
"""

from __future__ import annotations

from jaxtyping import Float, Int, Real, Shaped
from torch import Tensor

States = Float[Tensor, " n *state"]  # states, and what has their shape: outputs of a network, noise, shifts
Index = Int[Tensor, " n"]  # one integer for each row: its step, its path, the row of its condition
Steps = int | Index  # one step of a chain for all rows, or one for each
Timestep = Real[Tensor, ""] | Real[Tensor, " n"]  # the label that a network is conditioned on
AnyShape = Shaped[Tensor, "..."]  # weights of a network, and what else has no shape that could be named
