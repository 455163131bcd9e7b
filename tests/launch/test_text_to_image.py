"""A run of a text-to-image prior, end to end: prompts from a file, an energy that reads them, a certificate a prompt, exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toys.text_pipelines import BETAS, flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiltune.finetune.certificate.deployment import Deployed, draw_deployed
from tiltune.finetune.config.prior import PriorConfig
from tiltune.finetune.runs.export import export_policy
from tiltune.finetune.runs.prompts import from_file, read_prompts
from tiltune.finetune.runs.run import open_run
from tiltune.samplers.denoiser import DiffusersDenoiser
from tiltune.samplers.loading.folder import left_empty
from tiltune.samplers.loading.policy import load_policy
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.loading.text import Prompts
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.policy import PolicyKind

ENERGY = """
def brightness(x, prompts, metadata):
    assert [one["sign"] for one in metadata] == ["1" if "apple" in prompt else "-1" for prompt in prompts]
    return 20 * x.mean((1, 2, 3)) * x.new_tensor([float(one["sign"]) for one in metadata])
"""
SMALL = ["--population-size", "120", "--soft-value-updates", "4", "--warm-start-updates", "2", "--warm-start-rows", "16"]
SMALL += ["--updates", "1", "--batch-size", "4", "--certificate-size", "100"]


@pytest.mark.parametrize("build", [stable_diffusion, stable_diffusion_xl])
def test_train_evaluate_export_and_sample(build: Callable[..., Path], tiltune: Callable[..., Any], tmp_path: Path) -> None:
    import diffusers
    from diffusers import DDIMScheduler

    prior = build(tmp_path / "prior", DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1))
    (tmp_path / "energy.py").write_text(ENERGY)
    (tmp_path / "prompts.csv").write_text('prompt,sign\na red apple,1\n"a dog, big",-1\n')
    run, energy = tmp_path / "run", f"{tmp_path / 'energy.py'}:brightness"
    chain = ["--steps", "4", "--guidance", "3", "--negative-prompt", "fog", "--policy", "lora"]
    trained = tiltune(
        "train", "--prior", prior, "--prompts", tmp_path / "prompts.csv", "--energy", energy, *chain, *SMALL, "--out", run
    )
    assert trained.status == 0, trained.err
    assert "condition: 'a red apple', 'a dog, big', guidance 3 against 'fog'" in trained.err + trained.out
    opened = open_run(run)
    assert opened.config.prior.prompts == ("a red apple", "a dog, big")
    assert [json.loads(one) for one in opened.config.prior.prompt_metadata] == [{"sign": "1"}, {"sign": "-1"}]

    (tmp_path / "unseen.csv").write_text("prompt,sign\na bird,-1\n")
    judged = tiltune("evaluate", run, "--energy", energy, "--held-out", tmp_path / "unseen.csv", "--beside", run)
    assert judged.status in (0, 1, 3), judged.err
    certificate = json.loads((run / "certificate.json").read_text())
    assert "a bird (held out)" in judged.out and "all held-out prompts:" not in judged.out  # there is one
    assert set(certificate["held_out"]["conditions"]) == {"a bird"}
    assert {"decided", "gap", "ess", "kl_to_prior"} <= certificate["summary"].keys()
    assert (run / "picture.png").exists()
    assert set(certificate["conditions"]) == {"a red apple", "a dog, big"}
    assert all({"verdict", "log_z", "gap"} <= one.keys() for one in certificate["conditions"].values())

    pictures = sorted(path.name for path in (run / "pictures").iterdir())
    assert pictures[0] == "a_bird.png" and pictures[1].startswith("a_dog_big-") and pictures[2:] == ["a_red_apple.png"]

    policy = opened.policy
    with torch.no_grad():  # as if it had been trained for long
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    policy.save(run / "policy")
    live = draw_deployed(policy, Deployed("", policy.prior.scheduler, 4, {"eta": 1.0}), 2, torch.Generator().manual_seed(0))
    for form in ("lora", "merged"):
        out = tmp_path / form
        assert tiltune("export", run, "--format", form, "--out", out).status == 0
        kind = getattr(diffusers, opened.prior.source.pipeline or "")
        pipeline = kind.from_pretrained(prior if form == "lora" else out)
        pipeline.scheduler = DDIMScheduler.from_pretrained(out, subfolder="scheduler")
        if form == "lora":
            pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(2, *opened.prior.shape, generator=generator)
        options: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": ["fog"] * 2, "num_inference_steps": 4, "eta": 1.0}
        drawn = pipeline(
            ["a red apple", "a dog, big"], latents=start, generator=generator, output_type="latent", **options
        ).images
        torch.testing.assert_close(drawn, live, rtol=1e-4, atol=1e-4)
        card = (out / "README.md").read_text()
        assert "guidance_scale=3.0, negative_prompt='fog'" in card
        assert (
            card.startswith("---\nlibrary_name: diffusers")
            and "# prior, tilted by tiltune" in card
            and "| a dog, big |" in card
            and "| alpha | 1:" in card
        )

    shown = tiltune("sample", run, "--n", 3, "--prompts", "a cat", "--out", tmp_path / "cats.safetensors")
    assert shown.status == 0 and "3 samples of shape (3, 8, 8)" in shown.out and (tmp_path / "cats.png").exists()
    known = ["--energy", energy, "--proposals", 20, "--out", tmp_path / "exact.safetensors"]
    shown = tiltune("sample", run, "--n", 2, "--exact", "--prompts", "a red apple", *known)  # its metadata is the run's
    assert shown.status == 0, shown.err
    shown = tiltune("sample", run, "--n", 3, "--labels", "1", "--out", tmp_path / "labels.safetensors")
    assert shown.status == 2 and "--labels 1: the run has no labels" in shown.err


def test_files_of_prompts(tmp_path: Path) -> None:
    def written(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    assert read_prompts(written("a.txt", "\ufeffa dog\n\n  a cat \n")) == (("a dog", "a cat"), ())
    texts, metadata = read_prompts(written("a.json", '[{"prompt": "two dogs", "count": 2}]'))
    assert texts == ("two dogs",) and json.loads(metadata[0]) == {"count": 2}
    assert read_prompts(written("b.json", '["a dog"]')) == (("a dog",), ())
    for name, content, said in (
        ("c.txt", "\n\n", "holds no prompt"),
        ("d.txt", b"caf\xe9", "is not UTF-8"),
        ("e.csv", "text\na dog\n", "has no 'prompt' in each of its rows"),
        ("f.json", "{", "is not JSON"),
        ("g.json", '{"prompt": "a dog"}', "has no 'prompt' in each of its rows"),
        ("h.csv", "prompt,count\n ,2\n", "prompt 1 of"),
        ("i.csv", "prompt\na red apple, shiny\n", "row 1 of .* has not as many fields as its head"),
        ("j.csv", 'prompt\n"a dog\n', "is not CSV"),
        ("k.json", '[{"prompt": "a dog", "weight": NaN}]', "without NaN"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            PriorConfig("x", prompts=(texts := read_prompts(written(name, content)))[0], prompt_metadata=texts[1])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")
    for given in (("a dog", str(tmp_path / "a.txt")), (str(written("prompts.tsv", "a dog")),)):
        with pytest.raises(ValueError, match=r"stands among prompts and is a file's name; give one file alone"):
            from_file(PriorConfig("x", prompts=given))


def test_prompts_are_refused_in_a_config() -> None:
    for settings, said in (
        ({"prompts": ("a dog ",)}, "has spaces around it"),
        ({"prompts": ()}, "prompts is an empty list"),
        ({"guidance": 3.0}, "give prompts, or leave them out"),
        ({"prompts": ("a dog",), "guidance": float("inf")}, "it is 1, for none, or more"),
        ({"prompts": ("a dog",), "labels": (1,)}, "give one of them"),
        ({"prompts": ("a dog",), "prompt_metadata": ("{}", "{}")}, "2 entries for 1 prompts"),
        ({"prompts": ("a dog",), "prompt_metadata": ("[1]",)}, "is no JSON object"),
    ):
        with pytest.raises(ValueError, match=said):
            PriorConfig("x", **settings)


@pytest.mark.parametrize("kind", ["full", "lora", "residual"])
def test_a_saved_policy_is_the_trained_one_under_guidance(kind: PolicyKind, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    prior = load_prior(stable_diffusion(tmp_path / "prior", DDIMScheduler(**BETAS)), 4, prompts=Prompts(("a dog",)))
    policy = make_policy(prior, kind, rank=2)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02)
    policy.save(tmp_path / "policy")
    state, label = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(1)), prior.chain.timesteps[1].float()
    loaded = load_policy(prior, tmp_path / "policy")
    assert torch.equal(loaded(state, label, prior.condition(2)), policy(state, label, prior.condition(2)))


@pytest.mark.parametrize("build", [stable_diffusion_3, flux])
def test_adapters_of_a_flow_load_in_plain_diffusers(build: Callable[..., Path], tmp_path: Path) -> None:
    """Policy and pipeline with the exported adapter: the same output of the network, guidance included."""
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler

    place = build(tmp_path / "prior", FlowMatchEulerDiscreteScheduler(shift=3.0))
    prior = load_prior(place, 4, prompts=Prompts(("a dog",)), image_size=8)
    policy = make_policy(prior, "lora", rank=2)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    export_policy(policy, "lora", tmp_path / "lora")
    assert prior.source is not None
    pipeline = getattr(diffusers, prior.source.pipeline or "").from_pretrained(place, **left_empty(place))
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    state, label = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(1)), prior.chain.timesteps[1].float()
    theirs = DiffusersDenoiser(pipeline.transformer, guidance=prior.denoiser.guidance)
    ours = policy(state, label, prior.condition(2))
    torch.testing.assert_close(theirs(state, label, prior.condition(2)), ours, rtol=1e-4, atol=1e-5)
    assert (ours - prior.denoiser(state, label, prior.condition(2))).abs().max() > 1e-3
