"""What the metrics of samples share: both sides on the CPU, where they are computed, and effective numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...finetune.certificate.evidence import Evidence


def on_cpu(evidence: Evidence) -> Evidence:
    """Both sides on the CPU, where these metrics and pictures are made."""
    names = ("samples", "energy", "log_ratio", "prior_samples", "prior_energy", "prior_log_ratio", "step_kl")
    climbed = None if evidence.climbed is None else evidence.climbed.cpu()
    return replace(evidence, **{name: getattr(evidence, name).cpu() for name in names}, climbed=climbed)


def generator_on_cpu(generator: torch.Generator) -> torch.Generator:
    """The generator, or one on the CPU that it seeds."""
    if generator.device.type == "cpu":
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))


def effective(weight: Tensor) -> float:
    """Effective number of samples, (sum w)² / sum w²."""
    return (weight.sum().square() / weight.square().sum()).item()
