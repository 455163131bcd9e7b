"""The verdict passes exact samplers and fails every planted failure: closed-form denoisers of wrong targets on the chain.

`python tests/calibrate.py` measures the rates; here each is drawn once, with a fixed seed.
"""

import json
import math

import pytest
import torch

from calibrate import planted
from calibrate_unknown import COUNTS, counted, exact_samples
from tiltune.finetune.certificate.criteria import judge_known
from tiltune.finetune.certificate.evidence import gather_evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from tiltune.finetune.config.train import TrainConfig
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.tasks.gaussian_mixture import MixtureDenoiser
from tiltune.tasks.metrics import known_truth
from tiltune.tasks.metrics.known_truth import modes_of, truth_metrics
from tiltune.tasks.mixture_chains import build_chain, in_states, shipped_prior, shipped_reference
from tiltune.tasks.mixture_target import energy, target_mixture
from toys.held_out_mixtures import held_out


def test_the_measured_rates_meet_their_bars():
    """The shipped counts behind the table of docs/theory.md, and one of its entries drawn again."""
    rows = json.loads(COUNTS.read_text())
    exact = {row: sizes for row, sizes in rows.items() if row.startswith("exact")}
    failures = [count for row, sizes in rows.items() if row not in exact for count in sizes.values()]
    assert sum(count.get("thick", 0) for count in failures) > 3000
    assert sum(count.get("pass", 0) for count in failures) <= 0.01 * sum(count.get("thick", 0) for count in failures)
    for sizes in exact.values():
        assert all(count.get("fail", 0) <= 0.01 * 300 for count in sizes.values())
    for row in ("exact, path noise 0.75", "exact denoiser, K = 50"):
        assert exact[row]["4000"]["inconclusive"] <= 0.2 * 300
    task = held_out(10)
    assert counted(exact_samples(task, "exact denoiser", 0.75), 1000, 5) == {"inconclusive": 5}
    found = counted(exact_samples(task, "components too wide", 0.75), 4000, 5)
    assert found["fail"] == 5 and found["thick fail"] == found["thick"] > 0


@pytest.fixture(scope="module")
def prior():
    return shipped_prior("ddpm", build_chain("ddpm"))


@pytest.fixture
def quarter(monkeypatch):
    """A quarter of the samples: enough to see what is planted."""
    monkeypatch.setattr(known_truth, "W2_SETS", known_truth.W2_SETS // 4)
    return 10_000


def metrics_of(prior, policy, size=40_000):
    generator = torch.Generator().manual_seed(0)
    evidence = gather_evidence(prior, policy, energy, 1.0, generator, size=size, starts=8)
    metrics = path_metrics(evidence) | truth_metrics(evidence.samples, target_mixture(), energy, generator)
    reference = shipped_reference()["ddpm"]
    metrics["log_z_error"] = abs(metrics["log_z"] - reference["log_z_forward"])
    metrics["gap_reference"] = reference["gap"]
    return evidence, metrics


def planted_policy(prior, name):
    return MixtureDenoiser(in_states(planted()[name], "ddpm"), prior.chain)


def test_the_exact_denoiser_passes_both_verdicts(prior, quarter):
    evidence, metrics = metrics_of(prior, planted_policy(prior, "exact denoiser"))
    assert judge_known(metrics)[0] == "pass", judge_known(metrics)
    assert judge_unknown(evidence, metrics)[0] == "pass", judge_unknown(evidence, metrics)
    assert metrics["elbo"] < metrics["log_z"] < metrics["eubo"]
    # The shipped reference is this measurement on 100k rollouts.
    assert abs(metrics["gap"] - metrics["gap_reference"]) < 4 * metrics["gap_se"]


TWO_MODES = "only modes (0,0) and (5,0)"


@pytest.mark.parametrize("name", [name for name in planted() if name not in ("exact denoiser", TWO_MODES)])
def test_a_planted_failure_fails(prior, name, quarter):
    _, metrics = metrics_of(prior, planted_policy(prior, name), quarter)
    verdict, reasons = judge_known(metrics)
    assert verdict == "fail", (verdict, reasons)


def test_a_policy_that_kept_two_modes_fails_although_its_own_side_looks_healthy(prior, quarter):
    _, metrics = metrics_of(prior, planted_policy(prior, TWO_MODES), quarter)
    assert metrics["ess"] > 0.5 and metrics["pareto_k"] < 0.7, "its own weights are healthy"
    # Its own estimate of log Z misses by about the share of the modes it holds, log(25 / 61) = -.89, and cannot know.
    assert metrics["log_z"] == pytest.approx(math.log(25 / 61), abs=0.1)
    assert metrics["gap"] > 10, "the target side sees what it does not visit"
    verdict, reasons = judge_known(metrics)
    assert verdict == "fail" and any("mode TV" in reason for reason in reasons), reasons


def test_a_policy_trained_by_tlm_on_two_modes_fails(prior, quarter):
    kept = torch.tensor([4, 7])  # (0, 0) and (5, 0)

    def two_modes(x):
        inside = torch.isin(modes_of(x, target_mixture()), kept)
        return torch.where(inside, energy(x), torch.inf)

    sizes = {"updates": 1, "warm_start_updates": 400, "warm_start_rows": 1024, "population_size": 20_000}
    config = TrainConfig(objective="tlm", tempering_ess=None, **sizes)
    result = Trainer(prior, two_modes, config, progress=False).train()
    evidence, metrics = metrics_of(prior, result.policy, quarter)
    assert metrics["pareto_k"] < 0.7 and abs(metrics["elbo"] - metrics["log_z"]) < 1.0, "its own side looks healthy"
    assert judge_known(metrics)[0] == "fail"
    assert judge_unknown(evidence, metrics)[0] == "fail"


def test_a_residual_network_on_a_prior_that_cannot_be_trained(prior):
    """The exact prior denoiser has no parameters: the residual network alone must learn the tilt."""
    from tiltune.samplers.mlp import MLPDenoiser, precondition_for_
    from tiltune.samplers.prior import Prior
    from tiltune.tasks.mixture_target import prior_mixture

    frozen = Prior(MixtureDenoiser(in_states(prior_mixture(), "ddpm"), prior.chain), prior.chain, (2,), prior.to_data)
    network = precondition_for_(MLPDenoiser(), prior.chain, 1.0)
    network.preconditioning[1].zero_()  # the skip belongs to the prior
    policy = ResidualDenoiser(frozen.denoiser, network)
    config = TrainConfig(warm_start_updates=150, updates=2, population_size=4000, batch_size=128)
    history = Trainer(frozen, energy, config, policy=policy, progress=False).train().history
    eubo = [record["eubo"] for record in history if "eubo" in record]
    assert eubo[0] > 1.0 and eubo[-1] < 0.5, eubo
