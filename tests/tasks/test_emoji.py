"""The shipped text-to-image prior: what it is, that plain diffusers draws the same from it, and what its bars catch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiltune.finetune.certificate.evidence import Evidence, gather_evidence
from tiltune.finetune.certificate.path_metrics import path_metrics
from tiltune.finetune.certificate.verdict import judge_unknown
from tiltune.finetune.energies.names import load_energy
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.resampling import systematic
from tiltune.tasks.classifier import predicted
from tiltune.tasks.emoji import CATEGORIES, FOLDER, PROMPTS, TASK, category, classifier, criteria, judge
from tiltune.tasks.task import load_task

STEPS, ALPHA = 6, 0.1


def test_what_is_shipped_is_small_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".txt"}
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.fixture(scope="module")
def prior() -> Prior:
    config = load_task("emoji").recipe().prior
    return TASK.load_prior(replace(config, steps=STEPS, prompts=("a heart", "a fruit")))


def test_a_prompt_draws_what_it_says(prior: Prior) -> None:
    """32 samples in turn, six steps: most are of their own category, the rest is not told apart by chance (p < 1e-6)."""
    images = Policy(prior, prior.denoiser).sample(64, seed=0)
    assert images.shape == (64, 3, 32, 32)
    found = predicted(classifier(), images)
    wanted = torch.tensor([CATEGORIES.index("smiley"), CATEGORIES.index("food")]).repeat(32)
    assert (found == wanted).double().mean() > 0.75
    assert (found[:, None] == wanted.roll(1)[:, None]).double().mean() < 0.25


def test_plain_diffusers_draws_the_same(prior: Prior) -> None:
    """Its own pipeline call from the same noise, float32."""
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, *prior.shape, generator=generator)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt"}
    live = pipeline(["a heart", "a fruit"], latents=start, generator=generator, **options).images * 2 - 1
    mine = Policy(prior, prior.denoiser).sample(2, seed=3)
    torch.testing.assert_close(mine.clamp(-1, 1), live, rtol=1e-4, atol=1e-4)


def test_energies_by_name() -> None:
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("redness", "symmetry", "compressibility", "incompressibility"):
        assert load_energy(name, TASK.module)(x).shape == (3,)
    whole = load_energy("category('food', 'plant', 'smiley', 'animal')", TASK.module)(x)
    assert whole.abs().max() < 1e-5  # the probability of all of them is 1
    with pytest.raises(ValueError, match="they are food, plant"):
        category("car")
    assert classifier().config["classes"] == len(CATEGORIES) and judge().config["classes"] == 31


@pytest.fixture(scope="module")
def evidence(prior: Prior) -> Evidence:
    """480 a side of "a fruit" with the prior as its own policy."""
    one = prior.only(1)
    energy = load_energy("redness", TASK.module)
    policy = Policy(one, one.denoiser)
    return gather_evidence(
        one, policy, energy, ALPHA, torch.Generator().manual_seed(0), size=480, starts=0, population="importance"
    )


def judged(evidence: Evidence) -> dict[str, Any]:
    """The task's criteria by name, and whether each is met."""
    generator = torch.Generator().manual_seed(0)
    metrics = path_metrics(evidence)
    metrics |= {"verdict_unknown_truth": judge_unknown(evidence, metrics)[2]}
    energy = load_energy("redness", TASK.module)
    metrics |= TASK.metrics(replace(load_task("emoji").recipe().prior, prompts=PROMPTS[:1]), evidence, energy, generator)
    return {one.name: one.met for one in criteria(metrics)}


def test_bars_hold_for_the_target_and_fail_for_the_prior_and_for_one_picture(evidence: Evidence) -> None:
    """The target's own samples, of the half that is not the target side, meet what is said of samples; the prior's do not, nor do
    copies of the reddest of them."""
    own, other = torch.arange(0, 480, 2), torch.arange(1, 480, 2)
    half = evidence.resampled(own, other)
    weight = (-half.energy / ALPHA).double().softmax(0)
    exact = systematic(weight, 120, torch.Generator().manual_seed(1))
    everything = torch.arange(240)
    named = ["mean energy off, in the prior's spreads", "|diversity ratio - 1|", "energy TV"]
    assert all(judged(half.resampled(exact, everything))[name] for name in named)
    of_prior = judged(half)
    assert not of_prior["mean energy off, in the prior's spreads"] and not of_prior["energy TV"]
    reddest = half.energy.argsort()[:3].repeat(40)
    assert not judged(half.resampled(reddest, everything))["|diversity ratio - 1|"]
