"""What the prior expects of the data along stored paths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ...samplers.denoiser import evaluate_in_parts
from ...samplers.prior import Prior
from ...samplers.shapes import Index, States
from ...samplers.trajectory import Trajectories


class PathData:
    """x_hat at the states of stored paths, from the first trained step on to what the last one leads to.

    The prior's outputs are those that the paths hold. Where they hold none, each state costs an evaluation; ``on_progress`` is
    called after those of each step.
    """

    def __init__(self, prior: Prior, paths: Trajectories, on_progress: Callable[[], None] | None = None) -> None:
        self.prior, self.paths = prior, paths
        if paths.prior_outputs is not None:
            self._outputs = paths.prior_outputs
            return
        self._outputs = torch.empty(prior.chain.num_kernels, len(paths), *prior.shape, device=paths.states.device)
        for row, k in enumerate(prior.chain.trained):
            self._outputs[row] = evaluate_in_parts(prior.denoiser, prior.chain, paths.states[k], k, paths.condition)
            if on_progress:
                on_progress()

    @torch.no_grad()
    def __call__(self, step: Index, path: Index) -> States:
        """[n, ...] of the states ``step`` of the paths ``path``."""
        chain = self.prior.chain
        after = step > chain.last_trained
        at = step.clamp(max=chain.last_trained)
        data = chain.kernel.clean(self.paths.states[at, path], at, self._outputs[chain.row_of_step(at), path])
        if bool(after.any()):
            data[after] = self._last[path[after]]
        return data

    @cached_property
    @torch.no_grad()
    def _last(self) -> States:
        """Of the states that the last trained step leads to."""
        prior, k = self.prior, self.prior.chain.last_trained + 1
        state = self.paths.states[k]
        if k == prior.chain.num_steps:
            return state
        output = evaluate_in_parts(prior.denoiser, prior.chain, state, k, self.paths.condition)
        return prior.chain.kernel.clean(state, k, output)

    def spread(self) -> Float[Tensor, " steps"]:
        """Standard deviation over paths and dimensions at each step, 1 before the first trained one."""
        path = torch.arange(len(self.paths), device=self.paths.states.device)
        found = torch.ones(self.prior.chain.last_trained + 2, device=path.device)
        for k in range(self.prior.chain.trained[0], len(found)):
            found[k] = self(torch.full_like(path, k), path).std().clamp(min=1e-6)
        return found
