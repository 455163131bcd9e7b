"""What is drawn for one purpose is not drawn again for another."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from tiltune.finetune.certificate.evidence import gather_evidence
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.noise import Noise
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.schedulers.brownian import brownian_chain
from tiltune.samplers.streams import OFFSETS, stream
from toys.linear_gaussian import LinearGaussian

SIZE, COUNT = 16, 400
CPU = torch.device("cpu")


def drawn(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(64, generator=generator)


@pytest.mark.parametrize("seed", [0, 1, 2, 1000, 2**31, 2**40 + 5])
def test_every_purpose_has_numbers_of_its_own(seed: int) -> None:
    for first, second in combinations(OFFSETS, 2):
        assert not torch.equal(drawn(stream(first, seed)), drawn(stream(second, seed)))
    assert torch.equal(drawn(stream("certificate", seed)), drawn(stream("certificate", seed)))


def test_an_offset_above_32_bits_is_none() -> None:
    """The control: why the offsets are small."""
    assert torch.equal(drawn(torch.Generator().manual_seed(3)), drawn(torch.Generator().manual_seed(3 + 2**62)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_is_judged_by_noise_that_it_has_not_drawn(rank: int) -> None:
    noise = Noise(0, rank, CPU)
    assert not torch.equal(drawn(noise.fresh("judging")), drawn(noise.generator))


@pytest.mark.parametrize("apart", [True, False])
def test_the_certificate_draws_by_other_noise_than_the_population(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior stands for a policy. In the control, where both draw by one stream, nearly all of its samples are those that the
    policy was trained on."""
    if not apart:
        monkeypatch.setitem(OFFSETS, "certificate", 0)
    task = LinearGaussian(brownian_chain(4), torch.zeros(SIZE).double(), torch.ones(SIZE).double())
    config = TrainConfig(population_size=COUNT, population="importance", warm_start_updates=1, updates=0, soft_value_updates=0)
    policy = ResidualDenoiser(task.prior().denoiser, MLPDenoiser(dim=SIZE, width=4, depth=1, fourier_features=1))
    trainer = Trainer(task.prior(), task.energy, config, policy=policy, progress=False)
    trainer.train()
    population = trainer.state.preparation.population
    assert population is not None
    prior, generator = task.prior(), stream("certificate", config.seed)
    evidence = gather_evidence(prior, prior.denoiser, task.energy, task.alpha, generator, size=COUNT, starts=0)
    seen = torch.isclose(evidence.samples[:, None], population.trajectories.terminal[None]).all(2).any(1)
    assert int(seen.sum()) == 0 if apart else int(seen.sum()) > 0.9 * COUNT
