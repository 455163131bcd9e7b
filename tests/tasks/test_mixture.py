"""The mixture as a task: its recipes, its prior by chain, and metrics that know the truth."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiltune.finetune.certificate.criteria import judge_known, unjudged
from tiltune.finetune.certificate.evidence import Evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.energies.names import combine
from tiltune.tasks import digits
from tiltune.tasks.metrics import known_truth
from tiltune.tasks.mixture import TASK, recipe
from tiltune.tasks.mixture_chains import CHAINS, DEFAULT_STEPS, data_variance
from tiltune.tasks.mixture_target import energy, target_mixture
from tiltune.tasks.task import load_task

SIZE = 40_000


def evidence_of(law: Any, alpha: float = 1.0) -> Evidence:
    """Samples of ``law`` on both sides, the weights even: a certificate without a chain."""
    x = law.sample(SIZE, torch.Generator().manual_seed(0)).float()
    value = energy(x)
    return Evidence(alpha, x, value, -value / alpha, x, 0 * value, 0 * value, torch.zeros(1), None, 0)


def test_the_recipe_needs_no_torch_and_its_energy_is_the_tasks() -> None:
    assert load_task("mixture") is TASK and recipe().task == TASK.name
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)) * 5
    assert torch.equal(combine(recipe().energy.terms, TASK.module)(x), energy(x))
    code = "import sys, tiltune.tasks.mixture as m; m.TASK.recipe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "train"),
    [
        ({}, {"updates": 40, "batch_size": 384, "learning_rate": 2e-4, "tempering_ess": 0.3, "population_size": 14_000}),
        ({"chain": "brownian"}, {"updates": 40, "batch_size": 256, "population_size": 18_000}),
        ({"chain": "flow"}, {"population_size": 80_000}),
        ({"objective": "reinforce_kl"}, {"population_size": 8_000}),
        ({"warm_start": "none"}, {"updates": 800, "batch_size": 384, "learning_rate": 2e-3, "population_size": 80_000}),
        (
            {"warm_start": "none", "objective": "reinforce_kl"},
            {"updates": 800, "batch_size": 512, "learning_rate": 5e-3, "tempering_ess": 0.6},
        ),
    ],
)
def test_recipes_follow_chain_and_warm_start(options: dict[str, Any], train: dict[str, Any]) -> None:
    config = recipe(**options)
    assert {name: getattr(config.train, name) for name in train} == train
    assert config.prior.steps == DEFAULT_STEPS[options.get("chain", "ddpm")]


@pytest.mark.parametrize("name", CHAINS)
def test_the_prior_has_the_configs_chain_and_says_what_it_is(name: str) -> None:
    prior = TASK.load_prior(PriorConfig(steps=10, chain=name))
    assert prior.chain.num_steps == 10 and prior.shape == (2,)
    assert prior.data_variance == data_variance(name) == (1.0 if name in ("ddpm", "ddim") else 50.3)
    assert prior.decisions == (f"{prior.chain.name}, K = 10",)
    assert TASK.load_prior(PriorConfig(steps=10)).chain.name == TASK.load_prior(PriorConfig(steps=10, chain="ddpm")).chain.name


def test_settings_that_would_change_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown chain 'dpm'"):
        TASK.load_prior(PriorConfig(chain="dpm"))
    with pytest.raises(ValueError, match="the chains of the mixture task fix eta, labels"):
        TASK.load_prior(PriorConfig(eta=0.5, labels=(3,)))
    with pytest.raises(ValueError, match="this task has one chain"):
        digits.TASK.load_prior(PriorConfig(steps=5, chain="flow"))
    with pytest.raises(ValueError, match="the chain of 'folder' is its scheduler's"):
        PriorConfig("folder", chain="flow")


def test_metrics_know_the_truth_and_judge_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact samples pass; samples of one mode less fail; away from the shipped reference the gap is left out, and said to be."""
    monkeypatch.setattr(known_truth, "W2_SETS", 10)  # of 40: most of the time, and enough to see this
    truth = target_mixture()
    lost = replace(truth, weights=truth.weights * (torch.arange(9) != 0))
    sums = combine(("energy",), TASK.module)
    verdicts, found = {}, {}
    for name, law in (("exact", truth), ("lost", lost)):
        evidence = evidence_of(law)
        metrics = path_metrics(evidence)
        metrics |= TASK.metrics(PriorConfig(steps=50), evidence, sums, torch.Generator().manual_seed(1))
        found[name] = metrics | {"log_z_error": 0.0, "gap": metrics["gap_reference"]}  # no chain made these paths
        verdicts[name] = judge_known(found[name])
    assert verdicts["exact"][0] == "pass", verdicts
    assert verdicts["lost"][0] == "fail" and any("mode TV" in reason for reason in verdicts["lost"][1])
    assert unjudged(found["exact"]) == [] and found["exact"]["log_z_true_se"] > 0
    evidence = evidence_of(truth)
    elsewhere = TASK.metrics(PriorConfig(steps=20), evidence, sums, torch.Generator().manual_seed(1))
    assert elsewhere["gap_reference"] is None and len(unjudged(elsewhere)) == 1
    assert elsewhere["w2"] == found["exact"]["w2"]


def test_what_the_truth_does_not_cover_is_refused() -> None:
    config, generator = PriorConfig(), torch.Generator().manual_seed(0)
    evidence = evidence_of(target_mixture())
    for other in (lambda x: 2 * energy(x), lambda x: x.square().sum(1)):
        with pytest.raises(ValueError, match="for the task's own energy alone"):
            TASK.metrics(config, evidence, other, generator)
    with pytest.raises(ValueError, match="closed form of the target"):
        TASK.metrics(config, replace(evidence, alpha=20.0), energy, generator)
    few = torch.arange(400)
    with pytest.raises(ValueError, match="need 40000 samples"):
        TASK.metrics(config, evidence.resampled(few, few), energy, generator)
