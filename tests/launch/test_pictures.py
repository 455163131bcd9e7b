"""Pictures of runs: what is shown, of images and of points, wherever the evidence lies."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltune.finetune.certificate.evidence import Evidence
from tiltune.launch.pictures import run_figure, sample_figure
from tiltune.tasks.plots.images import sheet, target_samples

FIGURES: dict[str, Any] = {"verdict": "pass", "elbo": 0.0, "log_z_forward": 0.1, "eubo": 0.2, "ess": 0.9, "target_ess": 40.0}
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def evidence_of(samples: Tensor) -> Evidence:
    """Half policy, half prior; the last prior sample alone has weight."""
    mine, theirs = samples.tensor_split(2)
    energy = torch.full((len(theirs),), 1e4)
    energy[-1] = 0.0
    zero = torch.zeros(len(mine))
    return Evidence(1.0, mine, zero, zero, theirs, energy, torch.zeros(len(theirs)), torch.zeros(4), None, 0)


def on(device: str, evidence: Evidence) -> Evidence:
    tensors = {field.name: getattr(evidence, field.name) for field in fields(evidence)}
    return replace(evidence, **{name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)})


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 5), (2,), (1,)])
def test_a_run_shows_prior_policy_and_target(shape: tuple[int, ...], device: str) -> None:
    samples = torch.randn(60, *shape, generator=torch.Generator().manual_seed(0))
    figure = run_figure(on(device, evidence_of(samples)), FIGURES)
    prior, policy, target, energies = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["Prior", "Policy (pass)", "Target: prior samples by weight", "Energy"]
    assert len(energies.patches) == 3
    if len(shape) == 3:
        # Thirty copies of the only sample that has weight, as many as there are prior samples.
        for axes, shown in ((prior, samples[30:]), (policy, samples[:30]), (target, samples[-1:].expand(30, *shape))):
            assert torch.equal(torch.as_tensor(axes.images[0].get_array()), sheet(shown))
        assert not torch.equal(sheet(samples[30:]), sheet(samples[:30]))
    elif shape == (2,):
        points = torch.as_tensor(np.asarray(target.collections[0].get_offsets()))
        assert torch.equal(points.float(), samples[-1:].expand(30, 2))


def test_a_sheet_has_a_white_line_between_images_and_no_empty_rows() -> None:
    gray = torch.arange(3.0)[:, None, None, None].sub(1).expand(3, 1, 2, 2)
    picture = sheet(gray)
    assert picture.shape == (2, 8, 3)
    assert picture[0, :, 0].tolist() == [0, 0, 1, 0.5, 0.5, 1, 1, 1]
    assert sheet(torch.zeros(100, 3, 2, 2)).shape == (23, 23, 3), "the first 64, eight by eight"
    assert sheet(torch.full((1, 1, 2, 2), -7.0)).unique().tolist() == [0], "clamped"
    color = torch.tensor([1.0, -1.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2)
    assert sheet(color)[0, 0].tolist() == [1, 0, 0.5]
    assert len(sample_figure(gray).axes[0].images) == 1


def test_target_samples_follow_the_weights() -> None:
    evidence = evidence_of(torch.arange(20.0)[:, None])
    assert target_samples(evidence, 5).flatten().tolist() == [19.0] * 5
    even = replace(evidence, prior_energy=torch.zeros(10))
    assert sorted(target_samples(even, 10).flatten().tolist()) == list(range(10, 20))
