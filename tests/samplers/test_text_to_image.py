"""Text-to-image priors: their chain is the pipeline's own call, guidance is in prior and policy alike, prompts are conditions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.toys.text_pipelines import BETAS, LENGTH, flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiltune.samplers.loading.folder import left_empty
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.loading.text import Prompts, with_prompts
from tiltune.samplers.log_ratio import step_log_ratio
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.noise_paths import NoisePaths, follow
from tiltune.samplers.rollout import rollout

STEPS = 5
TEXTS = ("a red apple", "a dog")


def schedulers() -> dict[str, Any]:
    from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler

    return {
        "ddim": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "ddpm": DDPMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction"),
        "euler_ancestral": EulerAncestralDiscreteScheduler(**BETAS),
    }


BUILDERS = {"StableDiffusionPipeline": stable_diffusion, "StableDiffusionXLPipeline": stable_diffusion_xl}


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("text") / request.param, schedulers()["ddim"])


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler_ancestral"])
def test_the_chain_is_the_pipelines_own_call(folder: Path, scheduler: Any, guidance: float) -> None:
    """Same prompts, same noise: latents of the pipeline in plain diffusers, and those of a rollout, to 1e-5."""
    import diffusers

    negative = "fog" if scheduler != "ddim" else ""  # for an empty one SDXL may have zeros
    prior = load_prior(folder, STEPS, scheduler=scheduler, prompts=Prompts(TEXTS, negative=negative, guidance=guidance))
    noise = torch.randn(STEPS + 1, 2, *prior.shape, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    steps = torch.Generator().manual_seed(2)
    noise[1:] = torch.stack([torch.randn(2, *prior.shape, generator=steps) for _ in range(STEPS)])
    paths = follow(prior, NoisePaths(torch.zeros_like(noise), noise, prior.condition(2)), 0)

    pipeline = getattr(diffusers, folder.name).from_pretrained(folder, scheduler=prior.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance, **prior.step_options}
    assert prior.call_options == {"guidance_scale": guidance} | ({"negative_prompt": negative} if negative else {})
    if negative:
        options["negative_prompt"] = [negative] * 2
    drawn = pipeline(list(TEXTS), latents=noise[0], generator=generator, output_type="latent", **options).images
    torch.testing.assert_close(paths.states[-1], drawn, rtol=1e-5, atol=1e-5)
    decoded = pipeline.vae.decode(drawn / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(prior.to_data(drawn), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux without guidance"])
def test_the_chain_of_a_flow_is_the_pipelines_own_call(name: str, tmp_path: Path) -> None:
    """With the scheduler's own stochastic step, which draws its noise from torch's global generator."""
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind = "StableDiffusion3Pipeline" if name == "sd3" else "FluxPipeline"
    scheduler = FlowMatchEulerDiscreteScheduler(
        stochastic_sampling=True, use_dynamic_shifting=name != "sd3", shift=3.0, base_image_seq_len=2, max_image_seq_len=64
    )
    if name == "sd3":
        place, guidance, size = stable_diffusion_3(tmp_path / kind, scheduler), 7.0, None
    else:
        place = flux(tmp_path / kind, scheduler, guidance_embeds=name == "flux")
        guidance, size = 3.5 if name == "flux" else 1.0, 8
    prior = load_prior(place, STEPS, prompts=Prompts(TEXTS), image_size=size)
    noise = torch.randn(STEPS + 1, 2, *prior.shape, generator=torch.Generator().manual_seed(1))
    pipeline = getattr(diffusers, kind).from_pretrained(place, **left_empty(place))
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    if name == "sd3":
        start = noise[0]
        options["negative_prompt"] = [""] * 2
    else:
        start = pipeline._pack_latents(noise[0], *noise[0].shape)  # pyright: ignore[reportPrivateUsage]
        options |= {"height": 8, "width": 8}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        drawn = pipeline(list(TEXTS), latents=start, **options).images
        torch.manual_seed(2)
        draws = [torch.randn_like(start) for _ in range(STEPS)]
    if name != "sd3":
        unpack = partial(pipeline._unpack_latents, height=8, width=8, vae_scale_factor=2)  # pyright: ignore[reportPrivateUsage]
        drawn, draws = unpack(drawn), [unpack(one) for one in draws]
    noise[1:] = torch.stack(draws)
    paths = follow(prior, NoisePaths(torch.zeros_like(noise), noise, prior.condition(2)), 0)
    torch.testing.assert_close(paths.states[-1], drawn, rtol=1e-5, atol=1e-5)
    decoded = pipeline.vae.decode(drawn / 1.5 + 0.06).sample
    torch.testing.assert_close(prior.to_data(drawn), decoded, rtol=1e-5, atol=1e-5)
    assert prior.call_options["guidance_scale"] == guidance


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_adapters_at_their_start_are_the_prior_under_guidance(folder: Path, guidance: float) -> None:
    """Log-ratio 0 exactly; after a step of the weights it is not, on the negative half alone too."""
    prior = load_prior(folder, STEPS, prompts=Prompts(TEXTS, guidance=guidance))
    policy = make_policy(prior, "lora", rank=2)
    paths = rollout(prior, policy, 4, torch.Generator().manual_seed(0))
    assert paths.step_log_ratio is not None and paths.step_log_ratio.abs().max() == 0
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    moved = rollout(prior, policy, 4, torch.Generator().manual_seed(0))
    assert moved.step_log_ratio is not None and moved.step_log_ratio.abs().min() > 0
    torch.testing.assert_close(
        step_log_ratio(prior.chain, prior.denoiser, policy, moved), moved.step_log_ratio, rtol=1e-3, atol=1e-4
    )


def test_guidance_is_one_formula_in_prior_and_policy(folder: Path) -> None:
    """out at w is linear in w: out_negative + w (out_condition - out_negative)."""
    state, label = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(401)
    outputs = dict[float, torch.Tensor]()
    for scale in (1.0, 2.0, 4.0):
        prior = load_prior(folder, STEPS, prompts=Prompts(TEXTS, guidance=scale))
        outputs[scale] = prior.denoiser(state, label, prior.condition(2))
    step = outputs[2.0] - outputs[1.0]
    assert step.abs().max() > 1e-4
    torch.testing.assert_close(outputs[4.0], outputs[1.0] + 3 * step, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_a_condition_that_energies_see_and_no_embedding(folder: Path) -> None:
    prior = load_prior(folder, STEPS, prompts=Prompts(TEXTS, ({"count": 3}, {})))
    condition = prior.condition(3)
    assert condition is not None and prior.num_conditions == 2
    assert condition.context() == {
        "prompts": ["a red apple", "a dog", "a red apple"],
        "metadata": [{"count": 3}, {}, {"count": 3}],
    }
    assert not any(tensor.requires_grad for tensor in condition.table.tensors.values())
    other = with_prompts(prior, Prompts(("a cat",)))
    assert other.denoiser is prior.denoiser and other.condition_table is not None and other.condition_table.names == ("a cat",)
    with pytest.raises(ValueError, match="leave the scale as it is"):
        with_prompts(prior, Prompts(("a cat",), guidance=2.0))


def test_what_does_not_fit_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel

    def refused(said: str, place: Path = folder, **settings: Any) -> None:
        with pytest.raises(ValueError, match=said) as error:
            load_prior(place, STEPS, **settings)
        assert "\n" not in str(error.value)

    refused("is text-to-image: name its prompts")
    refused(f"and the text encoder takes {LENGTH}", prompts=Prompts(("a dog" * LENGTH,)))
    refused("it is 1, for none, or more", prompts=Prompts(TEXTS, guidance=0.5))
    refused("the condition a dog stands twice", prompts=Prompts(("a dog", "a dog")))
    refused("is conditioned on prompts; leave them out", prompts=Prompts(TEXTS), labels=[1])

    def broken(name: str, change: Callable[[Path], object]) -> Path:
        place = tmp_path / name
        shutil.copytree(folder, place)
        change(place)
        return place

    def index(place: Path, **parts: Any) -> None:
        file = place / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | parts))

    def lose_weights(place: Path) -> None:
        file = place / "text_encoder" / "model.safetensors"
        weights = load_file(file)
        del weights[next(name for name in weights if name.endswith("fc1.weight"))]
        save_file(weights, file, metadata={"format": "pt"})

    asked = Prompts(TEXTS)
    refused("is missing or foreign", broken("weights", lose_weights), prompts=asked)
    foreign = broken("foreign", partial(index, text_encoder=["evil", "Evil"]))
    refused("code that comes with weights is never run", foreign, prompts=asked)
    refused("has no vae", broken("vae", partial(index, vae=[None, None])), prompts=asked)
    refused(
        "is missing, and its pipeline encodes", broken("tokens", lambda place: shutil.rmtree(place / "tokenizer")), prompts=asked
    )
    bare = tmp_path / "bare"
    shutil.copytree(folder / "unet", bare)
    shutil.copytree(folder / "scheduler", bare / "scheduler")
    refused("give the folder of the whole pipeline", bare)

    pndm = BUILDERS[folder.name](tmp_path / "pndm", PNDMScheduler(**BETAS, skip_prk_steps=True))
    refused("PNDMScheduler does not fit", pndm, prompts=Prompts(TEXTS))
    prior = load_prior(pndm, STEPS, prompts=Prompts(TEXTS), scheduler="ddpm")
    assert type(prior.scheduler).__name__ == "DDPMScheduler" and not prior.scheduler.config.clip_sample

    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "plain")
    refused("prompts are for StableDiffusionPipeline, ", tmp_path / "plain", prompts=Prompts(TEXTS))
