"""The shipped digits prior, its classifiers, and the task's verdict: an exact sampler passes, a collapsed one does not."""

import subprocess
import sys

import pytest
import torch

from tiltune.finetune.certificate.criteria import conclude
from tiltune.finetune.certificate.evidence import Evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.energies.names import combine
from tiltune.finetune.learning.objective_table import Objective
from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.resampling import systematic
from tiltune.samplers.rollout import rollout
from tiltune.tasks.classifier import predicted
from tiltune.tasks.digits import FOLDER, TASK, classes, classifier, criteria, judge
from tiltune.tasks.task import load_task


def test_what_is_shipped_is_small_and_holds_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}


def test_the_recipe_needs_no_torch():
    code = "import sys; from tiltune.tasks.task import load_task; load_task('digits').recipe(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def samples():
    prior = TASK.load_prior(PriorConfig(steps=20))
    return rollout(prior, None, 400, torch.Generator().manual_seed(0), keep=False).terminal


def test_the_prior_draws_every_digit(samples):
    """Each digit's share of 400 within 5 standard errors of a tenth; the two classifiers agree on most."""
    labels = predicted(judge(), samples)
    share = torch.bincount(labels, minlength=10) / 400
    assert (share - 0.1).abs().max() < 5 * (0.1 * 0.9 / 400) ** 0.5
    assert (labels == predicted(classifier(), samples)).double().mean() > 0.9


def test_class_energy_is_bounded_and_counts_sets(samples):
    """Labels smoothed by .05 bound it at about 5 nats: a wrong class costs at most a few more."""
    one, even, every = classes(3)(samples), classes(0, 2, 4, 6, 8)(samples), classes(*range(10))(samples)
    assert one.min() >= 0 and one.max() < 10
    assert (even[predicted(judge(), samples) % 2 == 0] < 1).double().mean() > 0.9
    assert every.abs().max() < 1e-5
    for wrong in ((), (10,), (-1,), (0.5,)):
        with pytest.raises(ValueError, match=r"classes\(3\)"):
            classes(*wrong)


def evidence_of(samples, policy):
    """A target side of the whole prior sample and a policy side of ``policy``, with log-ratios of an exact policy."""
    energy, alpha = classes(0, 2, 4, 6, 8), 0.5
    prior_energy, own = energy(samples), energy(policy)
    log_z = (-prior_energy / alpha).logsumexp(0) - torch.tensor(float(len(samples))).log()
    return Evidence(
        alpha,
        policy,
        own,
        -own / alpha - log_z,
        samples,
        prior_energy,
        -prior_energy / alpha - log_z,
        torch.zeros(19),
        None,
        0,
    )


def verdict(evidence):
    metrics = path_metrics(evidence)
    energy = combine(("classes(0, 2, 4, 6, 8)",), TASK.module)
    metrics |= TASK.metrics(PriorConfig(), evidence, energy, torch.Generator().manual_seed(1))
    return conclude(criteria(metrics), [])[0], metrics


def test_an_exact_sampler_passes_and_a_collapsed_one_fails(samples):
    weight = (-classes(0, 2, 4, 6, 8)(samples) / 0.5).double().softmax(0)
    exact = samples[systematic(weight, 400, torch.Generator().manual_seed(2))]
    found, metrics = verdict(evidence_of(samples, exact))
    assert found == "pass", metrics
    # The right classes only, and in each of them one image over and over: what a reward maximizer does.
    labels = predicted(judge(), exact)
    first = exact[[(labels == label).nonzero()[0, 0].item() for label in labels]]
    found, metrics = verdict(evidence_of(samples, first))
    assert found == "fail" and metrics["diversity"] < 0.5 and metrics["share"] > 0.9
    # The prior itself has the diversity and not the shares.
    found, metrics = verdict(evidence_of(samples, samples))
    assert found == "fail" and metrics["share"] < metrics["share_reference"] - 0.2


def test_workers_hide_no_criterion_and_what_is_not_measured_is_a_doubt(samples):
    """Behind worker processes all five criteria are there; of an energy without classes two are not, and nothing passes."""
    from tiltune.finetune.energies.workers.pool import EnergyPool

    weight = (-classes(0, 2, 4, 6, 8)(samples) / 0.5).double().softmax(0)
    evidence = evidence_of(samples, samples[systematic(weight, 400, torch.Generator().manual_seed(2))])
    metrics = path_metrics(evidence)
    found = {}
    for name, energy in (
        ("here", combine(("classes(0, 2, 4, 6, 8)",), TASK.module)),
        ("workers", EnergyPool(("classes(0, 2, 4, 6, 8)",), 2, search=TASK.module)),
        ("hidden", lambda x: x.flatten(1).mean(1)),
    ):
        own = metrics | TASK.metrics(PriorConfig(), evidence, energy, torch.Generator().manual_seed(1))
        found[name] = criteria(own), conclude(criteria(own), [])
    assert found["here"] == found["workers"]
    assert found["here"][1][0] == "pass" and len(found["here"][0]) == 5
    verdict, reasons = found["hidden"][1]
    assert verdict == "inconclusive" and [line.value for line in found["hidden"][0]][3:] == [None, None]
    assert reasons[0] == "share below the target's is a criterion of this task and was not measured"


def reinforce(batch, alpha, log_z, huber=None):
    """-mean sg[-E + mean E] Λ: reward maximization, without the KL to the prior."""
    return -((batch.energy.mean() - batch.energy) * batch.log_ratio).mean()


@pytest.mark.slow
def test_reinforce_without_kl_is_caught():
    """The negative control, from the default run's own warm start: a share that says yes, and a certificate that says no."""
    from dataclasses import replace

    from tiltune.finetune.certificate.evidence import gather_evidence

    task = load_task("digits")
    recipe = task.recipe()
    prior = task.load_prior(recipe.prior)
    energy = combine(recipe.energy.terms, task.module)
    config = replace(recipe.train, forward_rows=0, updates=240)
    trainer = Trainer(prior, energy, config, progress=False)
    trainer.objective = Objective(reinforce)
    result = trainer.train()
    generator = torch.Generator().manual_seed(5)
    evidence = gather_evidence(prior, result.policy, energy, config.alpha, generator, size=4000)
    metrics = path_metrics(evidence)
    metrics |= task.metrics(recipe.prior, evidence, energy, generator)
    found, reasons = conclude(criteria(metrics), [])
    shown = ("share", "share_reference", "diversity", "gap", "gap_se", "energy_tv", "log_z", "log_z_forward", "ess")
    print({name: round(metrics[name], 3) for name in shown}, found, reasons)
    assert found == "fail" and metrics["share"] > 0.98 and metrics["gap"] > 20


def kernel_limit(digit, paths, rollouts):
    """(KL(tilted || prior) over paths, what Gaussian kernels of the prior's variance can follow of it, its error), nats.

    The best of them move every kernel by delta*(s) = E_tilted[z | s], which follows E |delta*|² / 2. The square is a product of
    two independent estimates: the noise that a tilted path drew, and the mean over fresh prior rollouts from the same state,
    weighted by exp(-E/alpha), with the ends in place of the noise (`Bridge.mean`).
    """
    from tiltune.finetune.learning.trainer import Trainer
    from tiltune.samplers.bridge import bridge_of
    from tiltune.samplers.denoiser import evaluate

    recipe = TASK.recipe()
    prior, energy, alpha = TASK.load_prior(recipe.prior), classes(digit), recipe.train.alpha
    chain, bridge = prior.chain, bridge_of(prior.chain)
    population = Trainer(prior, energy, recipe.train, progress=False).fill_population(6000)
    weight = population.log_weight(alpha).double().softmax(0)
    total = (weight @ (-population.trajectories.energy.double() / alpha)).item() - population.log_z(alpha).item()
    generator = torch.Generator().manual_seed(3)
    followed, error = 0.0, 0.0

    def outputs(state, step):
        parts = zip(state.split(512), step.split(512), strict=True)
        return torch.cat([evaluate(prior.denoiser, chain, *part, None) for part in parts])

    with torch.no_grad():
        for k in range(chain.num_kernels):
            index = population.draw(paths, alpha, generator)
            start = population.trajectories.states[k, index]
            first = torch.full((paths,), k)
            own = chain.kernel.standardize(population.trajectories.states[k + 1, index], start, first, outputs(start, first))
            state = start.repeat_interleave(rollouts, 0)
            for step in range(k, chain.num_kernels):
                steps = torch.full((len(state),), step)
                mean = chain.kernel.mean(state, steps, outputs(state, steps))
                state = mean + chain.sigma[step] * torch.randn(state.shape, generator=generator)
            share = (-energy(prior.to_data(state)) / alpha).view(paths, rollouts).softmax(1)
            step = torch.full((len(state),), k)
            repeated = start.repeat_interleave(rollouts, 0)
            bridged = chain.kernel.standardize(bridge.mean(repeated, state, step), repeated, step, outputs(repeated, step))
            bridged = bridged.flatten(1).view(paths, rollouts, -1)
            second = (share[..., None] * (bridged - bridged.mean(1, keepdim=True))).sum(1)
            product = 0.5 * (own.flatten(1) * second).sum(1)
            followed += product.mean().item()
            error += product.var().item() / paths
    return total, followed, error**0.5


@pytest.mark.slow
def test_the_kernels_hold_little_of_the_gap():
    """What a perfect network would leave of KL(tilted || policy) at K = 20, class 8: under a third of it, within two errors."""
    total, followed, error = kernel_limit(8, paths=96, rollouts=48)
    print(f"KL(tilted || prior) {total:.2f}, followed by the best kernels {followed:.2f} ± {error:.2f}")
    assert followed - 2 * error < total  # more would be impossible
    assert total - followed < total / 3 + 2 * error
