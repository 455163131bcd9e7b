"""The shipped fashion prior, classifiers and held-out images: what they are, and what their energies do. No data set needed."""

import json
import subprocess
import sys

import pytest
import torch

from tiltune.finetune.certificate.evidence import Evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.energies.names import combine, load_energy
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.resampling import systematic
from tiltune.samplers.rollout import rollout
from tiltune.tasks.classifier import SmallClassifier, predicted
from tiltune.tasks.fashion import FOLDER, TASK, classes, classifier, criteria, heldout, inpainting, judge
from tiltune.tasks.inpainting import Inpainting
from tiltune.tasks.task import load_task


def test_what_is_shipped_is_small_and_holds_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert (FOLDER / "classifier" / "model.safetensors").stat().st_size < 100_000
    scheduler = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing", "leading would remember 15% of the widest direction at K = 20"


@pytest.fixture(scope="module")
def prior_samples():
    prior = load_prior(FOLDER, 10)
    assert prior.shape == (1, 16, 16) and not prior.chain.prior_last_steps
    assert prior.chain.remembered_share(25.0) < 1e-6
    return rollout(prior, None, 160, torch.Generator().manual_seed(0), keep=False).terminal


def test_the_prior_draws_clothes(prior_samples):
    """Ten steps: mean and spread of the data, -.43 and .64, in .1; both classifiers see most classes and mostly agree."""
    assert prior_samples.mean() == pytest.approx(-0.43, abs=0.1)
    assert prior_samples.std() == pytest.approx(0.64, abs=0.1)
    assert len(predicted(judge(), prior_samples).unique()) >= 7

    def agreement(images):
        return (predicted(judge(), images) == predicted(classifier(), images)).double().mean()

    noise = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert agreement(prior_samples) > 0.7 > 0.6 > agreement(0.64 * noise - 0.43)


def test_both_classifiers_know_most_held_out_images():
    """One image a class, not chosen for it: .86 of all test images are right, so 5 of 10 or fewer has p < .01."""
    assert heldout().shape == (10, 1, 16, 16) and heldout().min() >= -1 and heldout().max() <= 1
    for network in (classifier(), judge()):
        assert (predicted(network, heldout()) == torch.arange(10)).sum() >= 6
    assert classifier().config != judge().config


def test_class_energy_is_minus_log_of_the_classes_share():
    images = heldout()
    probability = classifier()(images).double().softmax(1)
    assert classes(7)(images).numpy() == pytest.approx(-probability[:, 7].log().numpy(), abs=1e-4)
    both = classes(5, 7)(images)
    assert both.numpy() == pytest.approx(-(probability[:, 5] + probability[:, 7]).log().numpy(), abs=1e-4)
    assert (both <= classes(7)(images) + 1e-6).all()
    for wrong in ((10,), (), (-1,)):
        with pytest.raises(ValueError, match="they are 0 T-shirt"):
            classes(*wrong)


def test_energies_have_a_gradient():
    images = heldout()[:2].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(classes(3)(images).sum(), images)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    (gradient,) = torch.autograd.grad(inpainting()(images).sum(), images)
    assert gradient[:, 0, 8:].eq(0).all() and gradient[:, 0, ::2, ::2][:, :4].ne(0).all()


def test_inpainting_measures_a_held_out_image():
    problem = inpainting(3, "box", std=0.2, every=1)
    assert torch.equal(problem.image, heldout()[3])
    assert problem.measured.sum() == 64
    # The image itself misses its own measurement by the noise: 64 squares, mean 1 ± .18.
    assert problem.residual(heldout()[3:4]).square().mean() == pytest.approx(1.0, abs=0.6)
    energies = problem(heldout())
    assert energies.argmin() == 3
    with pytest.raises(ValueError, match="no held-out image 10"):
        inpainting(10)


def test_a_classifier_survives_its_file(tmp_path):
    torch.manual_seed(0)
    network = SmallClassifier(8, width=4, classes=3)
    network.save(tmp_path)
    loaded = SmallClassifier.load(tmp_path)
    images = torch.randn(5, 1, 8, 8)
    assert loaded(images).numpy() == pytest.approx(network(images).detach().numpy(), abs=2e-3)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json missing"):
        SmallClassifier.load(tmp_path)
    with pytest.raises(ValueError, match="multiple of 4"):
        SmallClassifier(10)


# --- the task: evidence in, verdict and picture out


def evidence_of(prior, energy, share):
    """Evidence of a policy that draws one half of the prior samples by exp(-share · E), beside the other half."""
    lower, upper = prior[::2], prior[1::2]
    index = systematic(((-energy(lower).double()) * share).softmax(0), 64, torch.Generator().manual_seed(0))
    samples = lower[index]
    zero = torch.zeros(64)
    return Evidence(1.0, samples, energy(samples), zero, upper, energy(upper), torch.zeros(len(upper)), torch.zeros(10), None, 0)


@pytest.mark.parametrize("term", ["inpainting(9, std=2.0)", "classes(5, 7, 9)"])
def test_the_task_judges_what_its_energies_are_about(prior_samples, term):
    energy = combine([term], "tiltune.tasks.fashion")
    generator = torch.Generator().manual_seed(0)
    own = {"inpainting": "residual", "classes": "share"}[term.partition("(")[0]]
    found = {}
    for share in (0.0, 1.0):
        evidence = evidence_of(prior_samples, energy, share)
        metrics = path_metrics(evidence) | TASK.metrics(PriorConfig(), evidence, energy, generator)
        found[share] = metrics[own]
        names = [line.name for line in criteria(metrics)]
    assert (own == "share") == (found[1.0] > found[0.0]), "the tilt raises the share, and lowers the residual"
    assert any("pixels" in name for name in names) == (own == "residual")
    assert any("diversity" in name for name in names) == (own == "share")
    figure = TASK.picture(evidence, energy, [], metrics | {"verdict": "pass"})
    assert len(figure.axes) == (9 if own == "residual" else 3)


def test_the_recipe_names_an_energy_of_the_task_and_needs_no_torch():
    config = TASK.recipe()
    assert config.task == TASK.name and load_task("fashion") is TASK
    assert isinstance(load_energy(config.energy.terms[0], TASK.module), Inpainting)
    code = "import sys, tiltune.tasks.fashion as f; f.TASK.recipe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_task_loads_its_prior_with_the_configs_chain():
    assert TASK.load_prior(PriorConfig(steps=7)).chain.num_steps == 7
