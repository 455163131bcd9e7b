"""A prior with several conditions, each with a tilt of its own, whose laws are known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tiltune.samplers.chain import Chain
from tiltune.samplers.condition import Condition, ConditionTable
from tiltune.samplers.prior import Prior
from toys.linear_gaussian import LinearGaussian


@dataclass(frozen=True, eq=False)
class Conditional:
    """N(0, I) through ``chain`` for every condition c, tilted by E(x, c) = slopes_c · x. slopes: [G, D] float64."""

    chain: Chain
    slopes: Tensor

    @cached_property
    def laws(self) -> list[LinearGaussian]:
        """One closed form for each condition."""
        return [LinearGaussian(self.chain, torch.zeros_like(slope), slope) for slope in self.slopes]

    @property
    def table(self) -> ConditionTable:
        count = len(self.slopes)
        return ConditionTable(
            tuple(f"label {10 * row}" for row in range(count)),
            {"class_labels": 10 * torch.arange(count)},
            {"prompts": tuple(f"prompt {row}" for row in range(count))},
        )

    def prior(self) -> Prior:
        plain = self.laws[0].prior()
        return Prior(plain.denoiser, self.chain, plain.shape, condition_table=self.table)

    def energy(self, x: Tensor, class_labels: Tensor) -> Tensor:
        """[N]; the labels are ten times the rows, so that one is not taken for the other."""
        return (x * self.slopes.to(x)[class_labels // 10]).sum(1)

    @cached_property
    def optimal_shift(self) -> Tensor:
        """[G, num_kernels, D] standard deviations by which the optimal policy moves each kernel's mean, at every state."""
        rows = torch.tensor(self.chain.trained)
        return torch.stack([self.chain.sigma[rows, None] * law.soft_value[0][rows + 1] for law in self.laws])


class ConditionalShift(nn.Module):
    """The prior with every kernel's mean moved by theta [G, num_kernels, D] standard deviations, by condition and step."""

    def __init__(self, problem: Conditional) -> None:
        super().__init__()
        chain = problem.chain
        self.prior, self.labels = problem.prior().denoiser, chain.timesteps
        self.gain = ((chain.d * chain.q + chain.e) / chain.sigma)[: chain.num_kernels].float()
        self.theta = nn.Parameter(torch.zeros(problem.optimal_shift.shape))

    def forward(self, state: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        step = (timestep.reshape(-1, 1).double() - self.labels).abs().argmin(1).clamp(max=len(self.gain) - 1)
        row = condition.network_inputs()["class_labels"] // 10
        return self.prior(state, timestep) + self.theta[row, step] / self.gain[step, None]
