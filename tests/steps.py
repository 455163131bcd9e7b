"""What updates move, measured apart from the bound: `python tests/steps.py PRIOR FILE.py:NAME ALPHA [--steps 20] [--seed 0]`.

Trains a prior of one's own as `tiltune train --prior` does. After each update KL(before || after) is measured once more, on 256
states of the population that the bound does not look at, spread evenly over the steps of the chain. At the end it prints these
nats as shares of the update's bound, and the time spent in the bound over that of the updates, looks at held-out paths included.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from tiltune.finetune.config.run import pretrained_recipe
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.runs.build import load_prior
from tiltune.finetune.runs.energies import absolute_term, load_energies
from tiltune.samplers.condition import selected
from tiltune.samplers.denoiser import evaluate

ROWS = 256


class Watched:
    """Measures each step of a training again, apart from the bound.

    shares: nats over the bound; updates, bounds: seconds in all updates, and of these in the bound.
    """

    def __init__(self, state):
        self.state, self.shares, self.updates, self.bounds, self.ended = state, [], 0.0, 0.0, None
        self.step, self.shorten, self.limits = state.optimization.step, state.bound.shorten, []
        state.optimization.step, state.bound.shorten = self.measured, self.timed

    def rows(self):
        kernels, paths = self.state.prior.chain.num_kernels, self.state.preparation.population.trajectories
        step = self.state.prior.chain.step_of_row(torch.arange(ROWS) % kernels)
        path = torch.randint(len(paths), (ROWS,), generator=torch.Generator().manual_seed(1))
        return paths.states[step, path], step, selected(paths.condition, path)

    @torch.no_grad()
    def outputs(self, state, step, condition):
        return evaluate(self.state.wrapped, self.state.prior.chain, state, step, condition)

    def timed(self, before, weights, limit):
        began = time.perf_counter()
        nats = self.shorten(before, weights, limit)
        self.bounds += time.perf_counter() - began
        self.limits.append(limit)
        return nats

    def measured(self, bound):
        if self.ended is not None:
            self.updates += time.perf_counter() - self.ended
        state, step, condition = self.rows()
        before = self.outputs(state, step, condition)
        self.limits = []
        began = time.perf_counter()
        nats = self.step(bound)
        self.updates += time.perf_counter() - began
        chain = self.state.prior.chain
        shift = chain.kernel.shift(state, step, self.outputs(state, step, condition), before).double()
        kl = (0.5 * shift.flatten(1).square().sum(1)).mean().item() * chain.num_kernels
        self.shares += [kl / limit for limit in self.limits]
        self.ended = time.perf_counter()
        return nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior")
    parser.add_argument("energy")
    parser.add_argument("alpha", type=float)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = pretrained_recipe(options.prior, absolute_term(options.energy))
    config = replace(
        recipe,
        prior=replace(recipe.prior, steps=options.steps),
        train=replace(recipe.train, alpha=options.alpha, seed=options.seed),
    )
    trainer = Trainer(load_prior(config, None), load_energies(config, None), config.train)
    watched = Watched(trainer.state)
    trainer.train()
    share = torch.tensor(watched.shares)
    print(
        f"{len(share)} updates: nats moved over the bound, median {share.median():.3f}, 99% {share.quantile(0.99):.2f},"
        f" largest {share.max():.2f}; above 1: {(share > 1).sum()}, above 2: {(share > 2).sum()};"
        f" the bound took {watched.bounds / watched.updates:.1%} of their time"
    )


if __name__ == "__main__":
    main()
