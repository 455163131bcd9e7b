"""Exported policies in plain diffusers and peft: the same samples for the same noise, and nothing half written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
)
from torch import Tensor

from tiltune.finetune.certificate.deployment import Deployed, draw_deployed
from tiltune.finetune.runs import export
from tiltune.finetune.runs.export import export_policy
from tiltune.samplers.chain import Chain
from tiltune.samplers.loading.folder import PICKLES
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

STEPS = 3


@pytest.fixture(autouse=True)
def _seeded_weights() -> Iterator[None]:
    """Networks are built from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def unet(channels: int = 1, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **config,
        )


def first_stage() -> Any:
    config: dict[str, Any] = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(norm_num_groups=2, latent_channels=3, **config)


def mlp() -> Any:
    network = MLPDenoiser(dim=2, width=8, fourier_features=4)
    with torch.no_grad():
        network.outward.weight.copy_(torch.randn(2, 8, generator=seeded(0)))
    return network


def trained(prior: Prior, kind: Any) -> Policy:
    """A policy that is clearly not its prior."""
    policy, generator = make_policy(prior, kind, rank=2), seeded(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def bare(network: Any, scheduler: Any, folder: Path) -> Path:
    network.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    return folder


def saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


STRANGERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "ddpm clipped": (lambda folder: saved(DDPMPipeline(unet(), DDPMScheduler()), folder), {}, "DDPMPipeline"),
    "ddpm v, another variance": (
        lambda folder: saved(DDPMPipeline(unet(3), DDPMScheduler(prediction_type="v_prediction", clip_sample=False)), folder),
        {"variance": "fixed_large"},
        "DDPMPipeline",
    ),
    "ddpm with noise in its last step": (
        lambda folder: saved(DDPMPipeline(unet(), DDPMScheduler(variance_type="fixed_large", steps_offset=1)), folder),
        {},
        "DDPMPipeline",
    ),
    "half-precision weights": (
        lambda folder: saved(DDPMPipeline(unet().half(), DDPMScheduler()), folder),
        {},
        "DDPMPipeline",
    ),
    "ddim": (lambda folder: saved(DDIMPipeline(unet(3), DDIMScheduler()), folder), {"eta": 0.5}, "DDIMPipeline"),
    "ddim in a ddpm pipeline": (lambda folder: saved(DDPMPipeline(unet(), DDIMScheduler()), folder), {}, "DDIMPipeline"),
    "bare ddim v": (
        lambda folder: bare(unet(), DDIMScheduler(prediction_type="v_prediction", clip_sample=False), folder),
        {"eta": 0.7},
        "DDIMPipeline",
    ),
}


def images(samples: Tensor) -> Tensor:
    return (samples / 2 + 0.5).clamp(0, 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(usage: str) -> dict[str, Any]:
    """What the lines that an export returns define; they draw from torch's global generator."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(usage, names)
    return names


def call(pipeline: Any, **options: Any) -> Tensor:
    """Three images of a pipeline, [3, C, H, W] in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(3, num_inference_steps=STEPS, output_type="np", **options).images
    return torch.from_numpy(drawn).permute(0, 3, 1, 2)


@pytest.mark.parametrize("format", ["pipeline", "lora", "merged"])
@pytest.mark.parametrize("name", STRANGERS)
def test_exports_give_the_policys_samples_in_plain_diffusers(name: str, format: Any, tmp_path: Path) -> None:
    make, options, expected = STRANGERS[name]
    prior = load_prior(make(tmp_path / "prior"), STEPS, **options)
    policy = trained(prior, "full" if format == "pipeline" else "lora")
    names = run(export_policy(policy, format, tmp_path / "out"))
    assert len(names["images"]) == 4  # the shown lines work as they stand

    pipeline = names["pipeline"] if format != "lora" else getattr(diffusers, expected)(names["network"], names["scheduler"])
    assert type(pipeline).__name__ == expected
    theirs = call(pipeline, generator=seeded(1), **prior.step_options)
    # The live policy's network in a plain loop: for a noiseless last step the trained chain asks the prior instead.
    live = draw_deployed(policy, Deployed("", prior.scheduler, STEPS, prior.step_options), 3, seeded(1))
    # Float32 at other addresses, which some processors' kernels round otherwise: up to 2.2e-6 was seen with adapters.
    bar = 1e-5 if format == "merged" else 4e-6 if format == "lora" else 1e-6
    torch.testing.assert_close(theirs, images(live), rtol=0, atol=bar)
    if not prior.chain.prior_last_steps:
        torch.testing.assert_close(theirs, images(policy.sample(3, seed=1)), rtol=0, atol=1e-5)
    # The comparison sees: the prior is far away, and so is other noise.
    for other in (make_policy(prior).sample(3, seed=1), policy.sample(3, seed=2)):
        assert (images(other) - theirs).abs().max() > 0.05
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in PICKLES]


def test_the_adapter_format_is_pefts_own(tmp_path: Path) -> None:
    """`PeftModel.save_pretrained` writes the same names, shapes and values."""
    import peft
    from safetensors.torch import load_file

    prior = load_prior(saved(DDPMPipeline(unet(), DDPMScheduler()), tmp_path / "prior"), STEPS)
    export_policy(trained(prior, "lora"), "lora", tmp_path / "out")
    network = UNet2DModel.from_pretrained(tmp_path / "prior", subfolder="unet", use_safetensors=True)
    loaded: Any = peft.PeftModel.from_pretrained(network, str(tmp_path / "out"))
    loaded.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "again"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "prior")
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_exported_pipeline_is_a_prior_again(tmp_path: Path) -> None:
    prior = load_prior(saved(DDPMPipeline(unet(), DDPMScheduler()), tmp_path / "prior"), STEPS, variance="fixed_large")
    policy = trained(prior, "full")
    export_policy(policy, "pipeline", tmp_path / "out")
    again = load_prior(tmp_path / "out", STEPS)
    assert again.chain.name == "ddpm fixed_large"
    for mine, exported in zip(policy.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(mine, exported)


@pytest.mark.parametrize("format", ["pipeline", "merged"])
def test_latents_keep_their_decoder(format: Any, tmp_path: Path) -> None:
    stranger: Any = LDMPipeline(vqvae=first_stage(), unet=unet(3), scheduler=DDIMScheduler())  # pyright: ignore[reportArgumentType]
    prior = load_prior(saved(stranger, tmp_path / "prior"), STEPS, eta=0.5)
    (tmp_path / "prior" / "vqvae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle beside the weights stays behind")
    policy = trained(prior, "full" if format == "pipeline" else "lora")
    usage = export_policy(policy, format, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin"))
    pipeline = run(usage)["pipeline"]
    assert type(pipeline) is LDMPipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = call(pipeline, eta=0.5)
    live = draw_deployed(policy, Deployed("", prior.scheduler, STEPS, prior.step_options), 3, seeded(4))
    torch.testing.assert_close(theirs, images(prior.to_data(live)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["pipeline", "merged", "lora"])
def test_a_prior_that_is_stored_as_a_variant_exports_what_loads(format: Any, tmp_path: Path) -> None:
    """Every part of the prior has fp16 weights only, which a pipeline does not look for by itself."""
    stranger: Any = LDMPipeline(vqvae=first_stage().half(), unet=unet(3).half(), scheduler=DDIMScheduler())  # pyright: ignore[reportArgumentType]
    stranger.save_pretrained(tmp_path / "prior", variant="fp16")
    assert all(".fp16." in path.name for path in (tmp_path / "prior").rglob("*.safetensors"))
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        LDMPipeline.from_pretrained(tmp_path / "prior", use_safetensors=True)
    prior = load_prior(tmp_path / "prior", STEPS)
    policy = trained(prior, "full" if format == "pipeline" else "lora")
    names = run(export_policy(policy, format, tmp_path / "out"))
    latents = torch.randn(2, *prior.shape, generator=seeded(0))
    network = names["network"] if format == "lora" else names["pipeline"].unet
    with torch.no_grad():
        theirs = network(latents, torch.tensor(300.0), return_dict=False)[0]
        torch.testing.assert_close(theirs, policy(latents, torch.tensor(300.0)), rtol=0, atol=1e-5)
        assert (prior.denoiser(latents, torch.tensor(300.0)) - theirs).abs().max() > 1e-3
        if format != "lora":
            decoder = names["pipeline"].vqvae
            decoded = decoder.decode(latents / decoder.config.scaling_factor).sample
            torch.testing.assert_close(decoded, prior.to_data(latents), rtol=0, atol=1e-5)


BARE: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "class labels": (lambda: unet(num_class_embeds=4), DDPMScheduler(), {"labels": [2]}),
    "euler ancestral": (unet, EulerAncestralDiscreteScheduler(), {}),
    "a flow": (unet, FlowMatchEulerDiscreteScheduler(), {}),
    "tiltune's own network": (mlp, DDPMScheduler(), {}),
}


@pytest.mark.parametrize("format", ["pipeline", "lora", "merged"])
@pytest.mark.parametrize("name", BARE)
def test_what_no_pipelines_call_samples_stays_a_bare_model(name: str, format: Any, tmp_path: Path) -> None:
    make, scheduler, options = BARE[name]
    prior = load_prior(bare(make(), scheduler, tmp_path / "prior"), STEPS, **options)
    policy = trained(prior, "full" if format == "pipeline" else "lora")
    names = run(export_policy(policy, format, tmp_path / "out"))
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert public(names["scheduler"].config) == public(scheduler.config)
    state = torch.randn(3, *prior.shape, generator=seeded(0))
    condition = prior.condition(3)
    labels = {} if condition is None else condition.network_inputs()
    with torch.no_grad():
        theirs = names["network"](state, torch.tensor(300.0), return_dict=False, **labels)[0]
        torch.testing.assert_close(policy(state, torch.tensor(300.0), condition), theirs, rtol=0, atol=1e-5)
        assert (prior.denoiser(state, torch.tensor(300.0), condition) - theirs).abs().max() > 1e-3


def public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def placed_prior(folder: Path) -> Prior:
    """The timesteps that a task places, on a checkpoint that names its source."""
    prior = load_prior(saved(DDPMPipeline(unet(), DDPMScheduler()), folder), STEPS)
    chain: Chain = chain_from_scheduler(prior.scheduler, timesteps=[900, 300, 0])
    return Prior(prior.denoiser, chain, prior.shape, source=prior.source, scheduler=prior.scheduler, decisions=prior.decisions)


def test_the_readme_says_what_the_deployed_call_changes(tmp_path: Path) -> None:
    prior = placed_prior(tmp_path / "prior")
    usage = export_policy(make_policy(prior), "pipeline", tmp_path / "placed")
    readme = (tmp_path / "placed" / "README.md").read_text()
    assert usage in readme
    assert "[900, 300, 0]" in readme
    assert all(line in readme for line in prior.decisions)
    even = load_prior(tmp_path / "prior", STEPS)
    export_policy(make_policy(even), "pipeline", tmp_path / "even")
    assert "placed" not in (tmp_path / "even" / "README.md").read_text()
    flow = load_prior(bare(unet(), FlowMatchEulerDiscreteScheduler(), tmp_path / "flow"), STEPS)
    export_policy(make_policy(flow), "pipeline", tmp_path / "flow out")
    assert "without the noise that it was trained with" in (tmp_path / "flow out" / "README.md").read_text()


def test_wrong_pairs_name_the_right_one(tmp_path: Path) -> None:
    prior = load_prior(saved(DDPMPipeline(unet(), DDPMScheduler()), tmp_path / "prior"), STEPS)
    wrong = [("full", "lora", "use pipeline"), ("full", "merged", "use pipeline"), ("lora", "pipeline", "use lora or merged")]
    for kind, format, message in wrong:
        with pytest.raises(ValueError, match=f"this is a {kind} policy, which cannot be exported as '{format}'; {message}"):
            export_policy(make_policy(prior, kind, rank=1), format, tmp_path / "out")  # pyright: ignore[reportArgumentType]
    for format in ("pipeline", "lora", "merged"):
        with pytest.raises(ValueError, match="a residual policy is the prior plus a second network"):
            export_policy(make_policy(prior, "residual"), format, tmp_path / "out")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'gguf' is unknown; choose one of pipeline, lora, merged"):
        export_policy(make_policy(prior), "gguf", tmp_path / "out")  # pyright: ignore[reportArgumentType]
    by_hand = Prior(unet(), prior.chain, prior.shape)
    with pytest.raises(ValueError, match="put together by hand"):
        export_policy(make_policy(by_hand), "pipeline", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(load_prior(saved(DDPMPipeline(unet(), DDPMScheduler()), tmp_path / "prior"), STEPS))
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for taken in (full, file):
        with pytest.raises(ValueError, match="is not empty, and nothing is overwritten"):
            export_policy(policy, "pipeline", taken)
    assert (full / "mine.txt").read_text() == file.read_text() == "mine"

    def interrupted(*args: Any) -> str:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(export, "_readme", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_policy(policy, "pipeline", tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
    export_policy(policy, "pipeline", empty)
    assert type(DiffusionPipeline.from_pretrained(empty, use_safetensors=True)) is DDPMPipeline
    assert sorted(tmp_path.iterdir()) == before
