"""Rows of a batch: as many at each step as its share says, to one row, and more where a change of the network moves more."""

import torch
from diffusers import DDPMScheduler

from tiltune.finetune.learning.rows import step_share, stratified
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler


def test_steps_come_by_their_shares_to_one_row() -> None:
    share = torch.tensor([0.5, 0.05, 0.2, 0.25])
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([stratified(share, 30, generator).bincount(minlength=4) for _ in range(2000)]).float()
    assert ((counts - 30 * share).abs() < 1 + 1e-4).all()
    # A share of 1.5 rows is 1 row or 2, each half of the time: 2000 draws, 4 standard errors.
    assert ((counts.mean(0) - 30 * share).abs() < 4 * 0.5 / 2000**0.5 + 1e-4).all()


def test_the_sensitivity_is_what_a_change_of_the_output_moves() -> None:
    chain = chain_from_scheduler(DDPMScheduler(clip_sample=False, prediction_type="v_prediction"), 10)
    state, output = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(chain.num_kernels):
        moved = chain.kernel.mean(state, k, output + 1) - chain.kernel.mean(state, k, output)
        torch.testing.assert_close(chain.sensitivity[k], moved.abs()[0, 0] / chain.sigma[k])
    share = step_share(chain)
    torch.testing.assert_close(share.sum(), torch.tensor(1.0))
    assert share.min() > 0.5 / chain.num_kernels and share.argmax() == chain.sensitivity.argmax()
    torch.testing.assert_close(step_share(brownian_chain(8)), torch.full((8,), 1 / 8))
