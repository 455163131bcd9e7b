"""Checkpoints that plain diffusers made and saved, as priors: the same samples for the same noise; what is refused, and how."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from torch import Tensor, nn

from tiltune.finetune.learning.trainer import Trainer
from tiltune.samplers.denoiser import ResidualDenoiser
from tiltune.samplers.loading import latent_decoder
from tiltune.samplers.loading.latent_decoder import LatentDecoder
from tiltune.samplers.loading.policy import load_policy
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.make_policy import make_policy
from tiltune.samplers.mlp import MLPDenoiser
from tiltune.samplers.policy import Policy
from tiltune.samplers.prior import Prior
from tiltune.samplers.rollout import rollout
from tiltune.samplers.schedulers.brownian import brownian_chain

STEPS = 5


@pytest.fixture(autouse=True)
def _seeded_weights() -> Iterator[None]:
    """Networks are built from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randomize_(network: nn.Module, seed: int = 0, scale: float = 0.1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def unet(channels: int = 1, **config: Any) -> Any:
    options = {"out_channels": channels, "sample_size": 8, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            in_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **options,
        )


def dit() -> Any:
    return randomize_(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=4,
            norm_num_groups=2,
            num_embeds_ada_norm=1000,
        )
    )


def vae(channels: int = 4) -> Any:
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=channels, **blocks)


def vqvae(channels: int = 3) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = VQModel(block_out_channels=(4,), norm_num_groups=2, latent_channels=channels, num_vq_embeddings=8)
        # Few codes far apart: a latent that is off by a rounding error falls on the same one.
        nn.init.normal_(model.quantize.embedding.weight)
    return model


def call(seed: int, draw: Callable[[], Any]) -> Tensor:
    """Images in [0, 1] of a pipeline that draws from torch's global generator, as [B, C, H, W]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.from_numpy(draw().images).permute(0, 3, 1, 2)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(samples: Tensor) -> Tensor:
    return (samples / 2 + 0.5).clamp(0, 1)


def plain_loop(
    network: Any, scheduler: Any, count: int, generator: torch.Generator, labels: Tensor | None, **options: Any
) -> Tensor:
    """What the diffusers documentation shows."""
    size = network.config.sample_size
    scheduler.set_timesteps(STEPS)
    state = torch.randn((count, network.config.in_channels, size, size), generator=generator)
    if hasattr(scheduler, "init_noise_sigma"):
        state = state * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state
        with torch.no_grad():
            output = network(fed, t, class_labels=labels).sample
        state = scheduler.step(output, t, state, generator=generator, **options).prev_sample
    return state


STRANGERS: dict[str, tuple[Any, Any, int]] = {
    "ddpm epsilon clipped": (DDPMPipeline, lambda: DDPMScheduler(), 1),
    "ddpm v unclipped, large": (
        DDPMPipeline,
        lambda: DDPMScheduler(prediction_type="v_prediction", clip_sample=False, variance_type="fixed_large"),
        3,
    ),
    "ddpm sample, cosine": (DDPMPipeline, lambda: DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"), 1),
    "ddim epsilon clipped": (DDIMPipeline, lambda: DDIMScheduler(), 3),
    "ddim v unclipped": (DDIMPipeline, lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False), 1),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_pipeline_gives_its_own_samples(name: str, tmp_path: Path) -> None:
    kind, make, channels = STRANGERS[name]
    kind(unet(channels), make()).save_pretrained(tmp_path)
    prior = load_prior(tmp_path, STEPS, eta=1.0)
    drawn = rollout(prior, None, 3, seeded(1)).terminal

    stranger = quiet(kind.from_pretrained(tmp_path))
    eta = {"eta": 1.0} if kind is DDIMPipeline else {}
    looped = plain_loop(stranger.unet, stranger.scheduler, 3, seeded(1), None, **eta)
    torch.testing.assert_close(drawn, looped, rtol=0, atol=1e-5)
    theirs = call(0, lambda: stranger(3, generator=seeded(1), num_inference_steps=STEPS, output_type="np", **eta))
    torch.testing.assert_close(images(prior.to_data(drawn)), theirs, rtol=0, atol=1e-5)
    # The comparison sees: other noise, and one step more.
    assert (rollout(prior, None, 3, seeded(2)).terminal - looped).abs().max() > 0.1
    assert (rollout(load_prior(tmp_path, STEPS + 1), None, 3, seeded(1)).terminal - looped).abs().max() > 0.01


@pytest.mark.parametrize("place", ["", "scheduler"])
def test_a_bare_model_with_a_scheduler_beside_it(place: str, tmp_path: Path) -> None:
    network, scheduler = unet(1), EulerAncestralDiscreteScheduler()
    network.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path / place)
    prior = load_prior(tmp_path, STEPS)
    looped = plain_loop(network.eval(), scheduler, 2, seeded(1), None)
    torch.testing.assert_close(rollout(prior, None, 2, seeded(1)).terminal, looped, rtol=1e-5, atol=1e-5)  # states up to 500
    assert prior.source is not None
    assert (prior.source.path, prior.source.pipeline, prior.source.denoiser) == (str(tmp_path.resolve()), None, "")


def test_tiltunes_own_network_and_a_flow(tmp_path: Path) -> None:
    network = randomize_(MLPDenoiser(dim=2, width=16, depth=1, fourier_features=8))
    network.save_pretrained(tmp_path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    prior = load_prior(tmp_path, STEPS, noise="flow_grpo", noise_level=0.5)
    assert prior.shape == (2,)
    assert prior.chain.name == "flow flow_grpo"
    by_hand = Prior(network, prior.chain, (2,))
    # The same weights at other addresses: some processors' kernels round by alignment.
    ours, theirs = (rollout(one, None, 4, seeded(0)).terminal for one in (prior, by_hand))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_class_labels_are_kept(tmp_path: Path) -> None:
    network, scheduler = unet(1, num_class_embeds=4), DDPMScheduler()
    network.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    prior = load_prior(tmp_path, STEPS, labels=[2])
    looped = plain_loop(network.eval(), scheduler, 3, seeded(1), torch.full((3,), 2))
    drawn = rollout(prior, None, 3, seeded(1)).terminal
    torch.testing.assert_close(drawn, looped, rtol=0, atol=1e-5)
    assert prior.condition(3).context()["class_labels"].tolist() == [2, 2, 2]
    for kind in ("full", "residual", "lora"):
        assert torch.equal(make_policy(prior, kind, rank=1).sample(3, seed=1), drawn)
    other = rollout(load_prior(tmp_path, STEPS, labels=[0]), None, 3, seeded(1)).terminal
    assert (other - drawn).abs().max() > 1e-3


@pytest.mark.parametrize("decoder", ["vq", "kl"])
def test_latents_are_decoded_as_their_pipeline_does(decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_stage = vae(3) if decoder == "kl" else vqvae(3)
    LDMPipeline(vqvae=first_stage, unet=unet(3), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    stranger = quiet(LDMPipeline.from_pretrained(tmp_path))
    prior = load_prior(tmp_path, STEPS, eta=0.5)
    drawn = rollout(prior, None, 3, seeded(4)).terminal
    theirs = call(4, lambda: stranger(3, eta=0.5, num_inference_steps=STEPS, output_type="np"))
    assert prior.shape == (3, 8, 8)
    assert images(prior.to_data(drawn)).std(0).max() > 0.01  # one picture a latent
    assert "before the energy" in prior.decisions[0]
    torch.testing.assert_close(images(prior.to_data(drawn)), theirs, rtol=0, atol=1e-5)
    monkeypatch.setattr(latent_decoder, "DECODE_BATCH", 2)
    torch.testing.assert_close(images(prior.to_data(drawn)), theirs, rtol=0, atol=1e-5)
    with torch.enable_grad():
        assert not prior.to_data(drawn.requires_grad_()).requires_grad


def test_a_dit_runs_its_class_without_guidance_and_without_its_learned_variance(tmp_path: Path) -> None:
    DiTPipeline(dit(), vae(4), DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    stranger = quiet(DiTPipeline.from_pretrained(tmp_path))
    prior = load_prior(tmp_path, STEPS, labels=[7])
    drawn = prior.to_data(rollout(prior, None, 2, seeded(4)).terminal)
    theirs = call(4, lambda: stranger([7, 7], guidance_scale=1.0, num_inference_steps=STEPS, output_type="np"))
    torch.testing.assert_close(images(drawn), theirs, rtol=0, atol=1e-5)
    assert "label 7 of 0 to 1000, without guidance (1000 is class-free); the learned variance" in prior.decisions[2]
    assert torch.equal(make_policy(prior, "residual").sample(2, seed=4), drawn)
    other = load_prior(tmp_path, STEPS, labels=[8])
    assert (other.to_data(rollout(other, None, 2, seeded(4)).terminal) - drawn).abs().max() > 1e-5


def test_half_precision_weights_are_held_in_float32(tmp_path: Path) -> None:
    DDPMPipeline(unet().half(), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    DDPMPipeline(unet().half(), DDPMScheduler()).save_pretrained(tmp_path / "variant", variant="fp16")
    for folder in ("plain", "variant"):
        prior = load_prior(tmp_path / folder, STEPS)
        assert {parameter.dtype for parameter in prior.denoiser.parameters()} == {torch.float32}
        assert "float16 weights held in float32" in prior.decisions[0]
        for mine, stored in zip(prior.denoiser.model.parameters(), unet().half().parameters(), strict=True):
            assert torch.equal(mine, stored.float())


def test_what_was_decided_is_three_lines(tmp_path: Path) -> None:
    DDPMPipeline(unet(3), DDPMScheduler(variance_type="fixed_small")).save_pretrained(tmp_path)
    prior = load_prior(str(tmp_path), 20, variance="fixed_large", precision="bf16")
    first, second, third = prior.decisions
    for fact in ("UNet2DModel of DDPMPipeline", str(tmp_path), "float32 weights, run in bf16", "states 3 x 8 x 8"):
        assert fact in first
    for fact in ("ddpm fixed_large", "K = 20", "epsilon", "clipped to ±1", "last step (sigma 0) belongs to the prior"):
        assert fact in second
    assert third == "condition: none"
    assert prior.scheduler.config.variance_type == "fixed_large"
    assert prior.source is not None
    assert (prior.source.pipeline, prior.source.denoiser) == ("DDPMPipeline", "unet")


def test_a_ddim_pipeline_runs_ddim_whatever_scheduler_it_was_saved_with(tmp_path: Path) -> None:
    DDIMPipeline(unet(), DDIMScheduler()).save_pretrained(tmp_path)
    DDPMScheduler(clip_sample_range=2.0).save_pretrained(tmp_path / "scheduler")
    prior = load_prior(tmp_path, STEPS, eta=0.5)
    assert prior.chain.name == "ddim eta=0.5"
    assert prior.chain.clip == 2.0
    assert prior.step_options == {"eta": 0.5}


def test_an_embedding_table_of_timesteps(tmp_path: Path) -> None:
    network = unet(1, time_embedding_type="learned", num_train_timesteps=1000)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    looped = plain_loop(network.eval(), DDPMScheduler(), 2, seeded(1), None)
    drawn = rollout(load_prior(tmp_path, STEPS), None, 2, seeded(1)).terminal
    torch.testing.assert_close(drawn, looped, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_the_networks_and_nothing_else(precision: Any, tmp_path: Path) -> None:
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(tmp_path)
    single, half = load_prior(tmp_path, STEPS), load_prior(tmp_path, STEPS, precision=precision)
    state = torch.randn(2, 1, 8, 8, generator=seeded(0))
    with torch.no_grad():
        outputs = [prior.denoiser(state, torch.tensor(300.0)) for prior in (single, half)]
    assert outputs[1].dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert 0 < (outputs[0] - outputs[1].float()).abs().max() < 0.05
    policy = make_policy(half, "full")
    randomize_(policy.denoiser, scale=0.05)
    drawn = rollout(half, policy, 2, seeded(0))
    assert drawn.step_log_ratio is not None
    assert drawn.states.dtype == drawn.step_log_ratio.dtype == torch.float32
    assert drawn.step_log_ratio.abs().max() > 0


def test_channels_last_changes_the_memory_and_not_the_samples(tmp_path: Path) -> None:
    DDPMPipeline(unet(3), DDPMScheduler()).save_pretrained(tmp_path)
    plain, last = load_prior(tmp_path, STEPS), load_prior(tmp_path, STEPS, channels_last=True)
    for prior, expected in ((plain, False), (last, True)):
        weight = prior.denoiser.model.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == expected
    drawn = [rollout(prior, None, 2, seeded(0)).terminal for prior in (plain, last)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-5)
    for kind in ("full", "residual", "lora"):
        policy = make_policy(last, kind, rank=1)
        policy.save(tmp_path / kind)
        assert torch.equal(load_policy(last, tmp_path / kind).sample(2), policy.sample(2))


# --- what is refused ----------------------------------------------------------------------------------------------------------


def pipeline_folder(folder: Path, network: Any = None, scheduler: Any = None) -> Path:
    DDPMPipeline(network or unet(), scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def with_pickle(folder: Path) -> Path:
    pipeline_folder(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item != "drop"}))


def edited(name: str, **changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        edit_json(pipeline_folder(folder) / name, **changes)
        return folder

    return make


def without(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (pipeline_folder(folder) / name).unlink()
        return folder

    return make


def overwritten(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (pipeline_folder(folder) / name).write_bytes(content)
        return folder

    return make


def truncated(folder: Path) -> Path:
    path = pipeline_folder(folder) / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return folder


def foreign_weights(folder: Path) -> Path:
    """The config of one network, the weights of another: one layer more, one less."""
    pipeline_folder(folder)
    unet(1, num_class_embeds=3).save_pretrained(folder / "other")
    (folder / "other" / "diffusion_pytorch_model.safetensors").replace(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def missing_layer(folder: Path) -> Path:
    """The config has a class embedding that the weights lack."""
    edit_json(pipeline_folder(folder) / "unet" / "config.json", num_class_embeds=3)
    return folder


def bare(network: Any, scheduler: Any = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        network().save_pretrained(folder)
        if scheduler is not None:
            scheduler.save_pretrained(folder)
        return folder

    return make


def latent_mismatch(folder: Path) -> Path:
    LDMPipeline(vqvae=vae(4), unet=unet(3), scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def two_variants(folder: Path) -> Path:
    pipeline_folder(folder)
    plain = folder / WEIGHTS
    for variant in ("fp16", "bf16"):
        plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(plain.read_bytes())
    plain.unlink()
    return folder


def a_file(folder: Path) -> Path:
    (folder / "model.ckpt").write_bytes(b"")
    return folder / "model.ckpt"


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "no folder": (lambda folder: folder / "nowhere", {}, "there is no folder .*nowhere"),
    "a file": (a_file, {}, "is a file; give the folder"),
    "an empty folder": (lambda folder: folder, {}, "neither a model_index.json .* nor a config.json"),
    "a pickle": (with_pickle, {}, "as a pickle .*diffusion_pytorch_model.bin.*refused"),
    "no weights": (without(WEIGHTS), {}, "has no weights"),
    "truncated weights": (truncated, {}, "cannot be read as a UNet2DModel"),
    "weights that are none": (overwritten(WEIGHTS, b"nothing"), {}, "cannot be read as a UNet2DModel"),
    "weights of another network": (foreign_weights, {}, "another network's: class_embedding.weight is missing or foreign"),
    "weights that lack a layer": (
        missing_layer,
        {"labels": [0]},
        "another network's: class_embedding.weight is missing or foreign",
    ),
    "weights of other shapes": (edited("unet/config.json", layers_per_block=1, in_channels=2), {}, "cannot be read as a UNet2D"),
    "two variants": (two_variants, {}, "in variants .bf16, fp16. and no plain ones"),
    "no scheduler": (without("scheduler/scheduler_config.json"), {}, "no scheduler/scheduler_config.json"),
    "a bare model without a scheduler": (bare(unet), {}, "no scheduler_config.json, beside its config.json or in scheduler/"),
    "a part of a pipeline": (
        lambda folder: pipeline_folder(folder) / "unet",
        {},
        "It is part of the pipeline .*give that folder",
    ),
    "an unsupported scheduler": (
        lambda folder: pipeline_folder(folder, scheduler=DPMSolverMultistepScheduler()),
        {},
        "DPMSolverMultistepScheduler does not fit.*Use one of",
    ),
    "a scheduler from elsewhere": (edited("scheduler/scheduler_config.json", _class_name="Mine"), {}, "'Mine', which diffusers"),
    "a scheduler that is a model": (
        edited("scheduler/scheduler_config.json", _class_name="UNet2DModel"),
        {},
        "'UNet2DModel', which diffusers",
    ),
    "a broken model_index.json": (overwritten("model_index.json", b"{"), {}, "model_index.json cannot be read"),
    "a list for a config": (overwritten("unet/config.json", b"[]"), {}, "config.json holds no JSON object"),
    "a custom pipeline": (edited("model_index.json", _class_name=["pipeline", "Mine"]), {}, "custom pipeline.*never run"),
    "a part with code of its own": (edited("model_index.json", unet=["my_unet", "UNet2DModel"]), {}, "unet: my_unet.UNet2DModel"),
    "text conditions": (
        edited("model_index.json", tokenizer=["diffusers", "X"]),
        {},
        "parts that a chain does not know .tokenizer",
    ),
    "no denoiser": (edited("model_index.json", unet="drop"), {}, "0 denoisers"),
    "a network that is not covered": (
        edited("unet/config.json", _class_name="UNet2DConditionModel"),
        {},
        "is a UNet2DConditionModel, which needs the text encoders",
    ),
    "a transformer that is no DiT": (
        edited("unet/config.json", _class_name="Transformer2DModel"),
        {},
        "cannot be read as a Transformer2DModel|no DiT",
    ),
    "learned variance": (
        bare(lambda: unet(1, out_channels=2), DDPMScheduler()),
        {},
        "takes 1 channels and gives 2 .a learned variance, which policy and prior would not share",
    ),
    "wrong channels": (bare(lambda: unet(2, out_channels=3), DDPMScheduler()), {}, "takes 2 channels and gives 3; a chain"),
    "no sample size": (bare(lambda: unet(1, sample_size=None), DDPMScheduler()), {}, "no sample_size"),
    "latents of other channels": (latent_mismatch, {}, "takes latents of 4 channels, but the denoiser makes 3"),
    "no label": (
        bare(lambda: unet(1, num_class_embeds=4), DDPMScheduler()),
        {},
        "give labels from 0 to 3, or all of them .none were given",
    ),
    "a label too large": (
        bare(lambda: unet(1, num_class_embeds=4), DDPMScheduler()),
        {"labels": [0, 4]},
        "from 0 to 3, or all of them .4 was given",
    ),
    "a label for nothing": (pipeline_folder, {"labels": [1]}, "labels were given, but this UNet2DModel is unconditional"),
    "a condition that is no class": (
        bare(lambda: unet(1, class_embed_type="timestep"), DDPMScheduler()),
        {"labels": [1]},
        "of type 'timestep'",
    ),
    "eta where nothing reads it": (pipeline_folder, {"eta": 0.5}, "eta=0.5 is DDIM's noise"),
    "noise where nothing reads it": (pipeline_folder, {"noise": "flow_grpo"}, "noise='flow_grpo' makes a deterministic flow"),
    "variance where nothing reads it": (
        lambda folder: pipeline_folder(folder, scheduler=DDIMScheduler()),
        {"variance": "fixed_large"},
        "variance='fixed_large' is DDPMScheduler's",
    ),
    "an unknown precision": (pipeline_folder, {"precision": "fp8"}, "precision is 'fp8'; choose one of float32, bf16, fp16"),
    "channels of no image": (
        bare(lambda: MLPDenoiser(width=8), DDPMScheduler()),
        {"channels_last": True},
        "convolutional networks, and MLPDenoiser",
    ),
    "no steps": (pipeline_folder, {"steps": 0}, "at least one step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence_that_teaches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load_prior(folder, **{"steps": STEPS, **options})
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "exploded").exists()


def test_the_pickle_of_the_test_above_does_explode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(_Bomb()))
    assert (tmp_path / "exploded").exists()


def test_a_hub_id_goes_through_diffusers_own_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline_folder(tmp_path / "cache")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path / "cache")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    prior = load_prior("someone/something", STEPS)
    assert asked == [("someone/something", {"use_safetensors": True})]
    assert prior.source is not None
    assert prior.source.path == "someone/something"
    # A folder of that name comes first.
    pipeline_folder(tmp_path / "someone" / "something")
    assert load_prior("someone/something", STEPS).source.path == str(tmp_path / "someone" / "something")  # pyright: ignore[reportOptionalMemberAccess]
    assert len(asked) == 1

    def offline(name: str, **options: Any) -> str:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(ValueError, match=r"no pipeline of that name came from the hub: no connection$"):
        load_prior("someone/else", STEPS)


# --- policies in folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora", "residual"])
def test_a_saved_policy_comes_back(kind: Any, tmp_path: Path) -> None:
    pipeline_folder(tmp_path / "prior")
    prior = load_prior(tmp_path / "prior", STEPS)
    policy = make_policy(prior, kind, rank=2)
    before = policy.sample(3)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            randomize_(nn.ParameterList([parameter]), scale=0.05)
    policy.save(tmp_path / "policy")
    assert not list((tmp_path / "policy").rglob("*.bin"))
    fresh = load_prior(tmp_path / "prior", STEPS)
    loaded = load_policy(fresh, tmp_path / "policy")
    assert loaded.kind == kind
    assert torch.equal(loaded.sample(3), policy.sample(3))
    assert not torch.equal(loaded.sample(3), before)
    assert torch.equal(rollout(fresh, None, 3, seeded(0)).terminal, before)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trainable == [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert not loaded.training


def test_a_saved_full_policy_is_a_diffusers_model(tmp_path: Path) -> None:
    policy = make_policy(load_prior(pipeline_folder(tmp_path / "prior"), STEPS))
    policy.save(tmp_path / "policy")
    network = UNet2DModel.from_pretrained(tmp_path / "policy", use_safetensors=True)
    for mine, theirs in zip(policy.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'; only LORA is covered"),
    "no method": ({"peft_type": None}, "peft_type None; only LORA is covered"),
    "a rank in words": ({"r": "x"}, "r = 'x', which is no rank"),
    "a rank of another type": ({"r": True}, "r = True, which is no rank"),
    "no rank": ({"r": 0}, "r = 0, which is no rank"),
    "a rank that would not fit into memory": ({"r": 10**12}, "not of rank 1000000000000"),
    "a scale in words": ({"lora_alpha": "8"}, "lora_alpha = '8'; it must be a positive number"),
    "a scale that is no number": ({"lora_alpha": float("nan")}, "lora_alpha = nan; it must be a positive number"),
    "a scale beyond floats": ({"lora_alpha": 10**400}, "lora_alpha = 10+; it must be a positive number"),
    "targets that are no names": ({"target_modules": [3]}, r"target_modules = \[3\]; it must be a list"),
    "no targets": ({"target_modules": []}, r"target_modules = \[\]; it must be a list"),
    "targets elsewhere": ({"target_modules": ["elsewhere"]}, "does not fit this prior's network: the target 'elsewhere'"),
    "a module to import": ({"megatron_core": "antigravity", "megatron_config": {}}, "sets megatron_core = 'antigravity'"),
    "another scaling": ({"use_rslora": True}, "sets use_rslora = True, which is not covered"),
    "ranks by layer": ({"rank_pattern": {"conv_in": 1}}, "sets rank_pattern = .*which is not covered"),
    "an option of a later peft": ({"use_tomorrow": True}, "sets use_tomorrow = True, which is not covered"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior's folder with a saved LoRA policy in policy/."""
    folder = pipeline_folder(tmp_path_factory.mktemp("adapter"))
    make_policy(load_prior(folder, STEPS), "lora", rank=2).save(folder / "policy")
    return folder


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_adapters_are_refused(name: str, adapter: Path, tmp_path: Path) -> None:
    changes, message = FOREIGN[name]
    shutil.copytree(adapter / "policy", tmp_path / "policy")
    edit_json(tmp_path / "policy" / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_policy(load_prior(adapter, STEPS), tmp_path / "policy")
    assert "antigravity" not in sys.modules


def test_an_adapter_that_peft_wrote_with_another_scale_is_loaded(adapter: Path, tmp_path: Path) -> None:
    """What peft says beside the three settings is no reason to refuse; the scale is the file's."""
    import peft

    randomized = make_policy(load_prior(adapter, STEPS), "lora", rank=2)
    for parameter in randomized.parameters():
        if parameter.requires_grad:
            randomize_(nn.ParameterList([parameter]), scale=0.05)
    randomized.save(tmp_path / "ours")
    edit_json(tmp_path / "ours" / "adapter_config.json", lora_alpha=5)
    network: Any = UNet2DModel.from_pretrained(adapter, subfolder="unet", use_safetensors=True)
    theirs: Any = peft.PeftModel.from_pretrained(network, str(tmp_path / "ours")).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(tmp_path / "ours" / "policy.json", tmp_path / "theirs")
    state, timestep = torch.randn(2, 1, 8, 8, generator=seeded(0)), torch.tensor(300.0)
    with torch.no_grad():
        loaded = load_policy(load_prior(adapter, STEPS), tmp_path / "theirs")
        torch.testing.assert_close(loaded(state, timestep), theirs(state, timestep, return_dict=False)[0], rtol=0, atol=1e-5)
        assert (loaded(state, timestep) - randomized(state, timestep)).abs().max() > 1e-4


def test_policies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    prior = load_prior(pipeline_folder(tmp_path / "prior"), STEPS)
    other = load_prior(pipeline_folder(tmp_path / "other", unet(3)), STEPS)
    for kind, message in (("full", "their configs differ"), ("lora", "does not fit this prior's network")):
        make_policy(other, kind, rank=1).save(tmp_path / kind)
        with pytest.raises(ValueError, match=message):
            load_policy(prior, tmp_path / kind)
    with pytest.raises(ValueError, match=r"policy.json cannot be read"):
        load_policy(prior, tmp_path / "prior")
    edit_json(tmp_path / "lora" / "policy.json", kind="half")
    with pytest.raises(ValueError, match="policy kind 'half'; full, lora and residual are known"):
        load_policy(prior, tmp_path / "lora")
    edit_json(tmp_path / "lora" / "policy.json", kind="lora")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"adapter in .* cannot be read"):
        load_policy(prior, tmp_path / "lora")
    by_hand = Prior(lambda state, timestep, condition=None: state, prior.chain, (1, 8, 8))
    with pytest.raises(ValueError, match="not a diffusers model, so no saved policy fits"):
        load_policy(by_hand, tmp_path / "full")
    residual = Policy(by_hand, ResidualDenoiser(by_hand.denoiser, nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match=r"its network is a Conv2d; give ResidualDenoiser a diffusers model"):
        residual.save(tmp_path / "none")
    full = Policy(by_hand, nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"this one's network is a Conv2d; save its state_dict\(\) yourself"):
        full.save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_policys_kind_follows_from_its_denoiser(tmp_path):
    """Whoever makes it: `make_policy`, or a user who gives a `ResidualDenoiser` to `Trainer`."""
    prior = load_prior(pipeline_folder(tmp_path / "prior", unet()), STEPS)
    for kind in ("full", "residual", "lora"):
        assert make_policy(prior, kind, rank=1).kind == kind
        assert Policy(prior, make_policy(prior, kind, rank=1).denoiser).kind == kind
    black_box = Prior(lambda state, timestep, condition=None: 0 * state, brownian_chain(2), (2,))
    network = MLPDenoiser(width=8, depth=1, fourier_features=4)
    trainer = Trainer(
        black_box, lambda x: x.square().sum(1), policy=ResidualDenoiser(black_box.denoiser, network), progress=False
    )
    policy = trainer.collected()
    assert policy.kind == "residual"
    policy.save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "policy.json").read_text()) == {"kind": "residual"}
    loaded = MLPDenoiser.from_pretrained(tmp_path / "policy" / "residual", use_safetensors=True)
    assert all(torch.equal(weight, network.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_a_shifted_latent_space_is_shifted_back():
    """As the pipelines of such models decode: vae.decode(latents / scale + shift)."""
    model = vae()
    model.register_to_config(shift_factor=0.4)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decoded = LatentDecoder(model)(latents)
    with torch.no_grad():
        assert torch.equal(decoded, model.decode(latents / model.config.scaling_factor + 0.4).sample)
        assert not torch.equal(decoded, model.decode(latents / model.config.scaling_factor).sample)
