"""What updates move, measured apart from the bound: `python tests/steps.py PRIOR FILE.py:NAME ALPHA [--steps 20] [--seed 0]`.

Trains a prior of one's own as `tiltune train --prior` does. After each update KL(before || after) is measured once more, on 256
states of the bank that the bound does not look at, spread evenly over the steps of the chain. At the end it prints these nats as
shares of the update's bound, and the time spent in the bound over that of the updates, looks at held-out paths included.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from tiltune.finetune.config.sections import pretrained_recipe
from tiltune.finetune.learning.trainer import Trainer
from tiltune.finetune.runs import run
from tiltune.samplers.denoiser import evaluate

ROWS = 256


class Watched(Trainer):
    """A trainer that measures each step again.

    shares: nats over the bound; updates, bounds: seconds in all updates, and of these in the bound.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.shares, self.updates, self.bounds, self.ended = [], 0.0, 0.0, None

    def states(self):
        kernels, bank = self.prior.chain.num_kernels, self.bank.trajectories
        step = torch.arange(ROWS) % kernels
        path = torch.randint(len(bank), (ROWS,), generator=torch.Generator().manual_seed(1))
        return bank.states[step, path], step

    @torch.no_grad()
    def outputs(self, state, step):
        return evaluate(self.policy, self.prior.chain, state, step, None)

    def _step(self, most, peak):
        started, limits = time.perf_counter(), []
        shorten = self.bound.shorten

        def timed(before, weights, limit):
            began = time.perf_counter()
            nats = shorten(before, weights, limit)
            self.bounds += time.perf_counter() - began
            limits.append(limit)
            return nats

        if self.ended is not None:
            self.updates += started - self.ended
        state, step = self.states()
        before = self.outputs(state, step)
        self.bound.shorten = timed
        began = time.perf_counter()
        nats = super()._step(most, peak)
        self.updates += time.perf_counter() - began
        del self.bound.shorten
        chain = self.prior.chain
        shift = chain.kernel_shift(state, step, self.outputs(state, step), before).double()
        kl = (0.5 * shift.flatten(1).square().sum(1)).mean().item() * chain.num_kernels
        self.shares += [kl / limit for limit in limits]
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
    recipe = pretrained_recipe(options.prior, run.absolute_term(options.energy))
    config = replace(
        recipe,
        prior=replace(recipe.prior, steps=options.steps),
        train=replace(recipe.train, alpha=options.alpha, seed=options.seed),
    )
    trainer = Watched(run.load_prior(config, None), run.load_energies(config, None), config.train)
    trainer.train()
    share = torch.tensor(trainer.shares)
    print(
        f"{len(share)} updates: nats moved over the bound, median {share.median():.3f}, 99% {share.quantile(0.99):.2f},"
        f" largest {share.max():.2f}; above 1: {(share > 1).sum()}, above 2: {(share > 2).sum()};"
        f" the bound took {trainer.bounds / trainer.updates:.1%} of their time"
    )


if __name__ == "__main__":
    main()
