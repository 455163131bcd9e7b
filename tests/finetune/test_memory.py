"""What a training is said to need of memory before it begins."""

import pytest
import torch
from diffusers import DDPMScheduler

from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning import memory
from tiltune.finetune.learning.memory import estimate_memory
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.prior import Prior
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

# Blocks of 32 MB: malloc takes these from the system and gives them back, whatever a test before has left in its heap.
ROWS, LAYERS, WIDTH = 4, 8, 2**21
KEPT = 4 * LAYERS * WIDTH * ROWS  # bytes that a gradient through `Deep` holds, 256 MB; without one, two layers


class Deep(torch.nn.Module):
    """A function of the first coordinate, through many wide layers."""

    def forward(self, state, timestep, condition=None):
        wide = state[:, :1].expand(-1, WIDTH)
        for _ in range(LAYERS):
            wide = wide.sin()
        return wide.mean(1, keepdim=True).expand_as(state)


@pytest.mark.skipif(not memory._tells(torch.device("cpu")), reason="the system does not tell")
@pytest.mark.parametrize(("warm_start", "counted"), [("value_drift", True), ("tlm", False)])
def test_the_gradient_through_the_prior_is_counted_where_the_warm_start_takes_one(warm_start, counted, monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 0)
    monkeypatch.setattr(memory, "rows_at_once", lambda *_: 2)
    scheduler = DDPMScheduler(variance_type="fixed_large", beta_schedule="squaredcos_cap_v2", clip_sample=False)
    prior = Prior(Deep(), chain_from_scheduler(scheduler, 4), (2,))
    policy = ResidualDenoiser(prior.denoiser, MLPDenoiser(width=8, depth=1, fourier_features=2))
    config = TrainConfig(
        warm_start=warm_start, soft_value_updates=10, warm_start_rows=ROWS, population_size=100, batch_size=2, objective="rtb"
    )
    trainer = Trainer(prior, lambda x: x.sum(1), config, policy=policy, progress=False)
    estimate = estimate_memory(trainer.state)
    assert estimate is not None
    assert (estimate.parts["one chunk, step or decoding"] > 0.9 * KEPT) == counted
    assert estimate.parts["paths of the population"] == 4 * 5 * 2 * (100 * 2 + 25)
    assert all(weight.grad is None for weight in policy.parameters())
