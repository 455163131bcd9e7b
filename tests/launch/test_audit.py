"""Audits of what others trained: untouched, trained by plain policy gradient, collapsed, in every form that is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.toys.plain_policy_gradient import train
from tests.toys.text_pipelines import BETAS, stable_diffusion
from tiltune.finetune.certificate.closest_alpha import closest_alpha, least_kl
from tiltune.finetune.config.prior import PriorConfig
from tiltune.launch import rows_picture
from tiltune.samplers.condition import Condition
from tiltune.samplers.loading.foreign import load_foreign_policy
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.loading.text import Prompts
from tiltune.samplers.policy import Policy
from tiltune.tasks.digits import FOLDER, judge
from tiltune.tasks.task import load_task

PROMPTS = ["a cat", "a dog"]
FLAGS = ["--prompts", *PROMPTS, "--guidance", "1", "--scheduler", "ddim", "--steps", "5", "--size", "120"]
REDNESS = "tiltune.finetune.energies.pictures:redness"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDIMScheduler

    return stable_diffusion(tmp_path_factory.mktemp("audit") / "base", DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1))


@pytest.fixture(scope="module")
def loras(base: Path) -> dict[str, Path]:
    """Folders of save_lora_weights: by name, what became of the LoRA."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    found = {}
    for name, updates in (("untouched", 0), ("trained", 25)):
        pipeline = StableDiffusionPipeline.from_pretrained(base)
        train(pipeline, PROMPTS, updates=updates, steps=5, lr=3e-2, batch=16)
        found[name] = base.with_name(name)
        StableDiffusionPipeline.save_lora_weights(found[name], get_peft_model_state_dict(pipeline.unet))
    return found


def audit(tiltune: Callable[..., Any], base: Path, policy: Path, out: Path) -> tuple[Any, dict[str, Any]]:
    shown = tiltune("audit", "--prior", base, "--policy", policy, "--energy", REDNESS, *FLAGS, "--out", out)
    assert shown.status in (0, 1, 3), shown.err
    assert (out / "picture.png").exists()
    return shown, json.loads((out / "audit.json").read_text())


def test_untouched_and_trained_are_told_apart(
    tiltune: Callable[..., Any], base: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    shown, found = audit(tiltune, base, loras["untouched"], tmp_path / "untouched")
    assert "never trained" in shown.out and found["untouched"] and shown.status == 1
    assert [one["kl_to_prior"] for one in found["conditions"]] == [0.0, 0.0]
    shown, found = audit(tiltune, base, loras["trained"], tmp_path / "trained")
    assert not found["untouched"] and found["moved"] and "It moved" in shown.out
    assert [one["condition"] for one in found["conditions"]] == PROMPTS
    refused = tiltune(
        "audit", "--prior", base, "--policy", loras["trained"], "--energy", REDNESS, *FLAGS, "--out", tmp_path / "trained"
    )
    assert refused.status == 2 and "not an empty folder" in refused.err


def output_of(base: Path, policy: Path | None) -> torch.Tensor:
    prior = load_prior(base, steps=5, scheduler="ddim", prompts=Prompts(tuple(PROMPTS), guidance=1.0))
    denoiser: Any = prior.denoiser if policy is None else load_foreign_policy(prior, policy)
    table = prior.condition_table
    assert table is not None
    state = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(state, torch.tensor([500, 300]), Condition(table, torch.tensor([0, 1])))


def test_every_form_of_one_policy_is_the_same_policy(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    saved = loras["trained"] / "pytorch_lora_weights.safetensors"
    weights = load_file(saved)
    expected = output_of(base, loras["trained"])
    assert (expected - output_of(base, None)).abs().max() > 1e-3
    # As plain diffusers runs it.
    pipeline: Any = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(loras["trained"])
    words = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    state = torch.randn(2, *expected.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live = pipeline.unet(state, torch.tensor([500, 300]), words).sample
    torch.testing.assert_close(expected, live, rtol=1e-5, atol=1e-5)
    forms = {
        "old": {key.replace(".to_out.0.lora", ".to_out_lora"): part for key, part in renamed(weights).items()},
        "alone": weights,
    }
    for name, state in forms.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / ("any.safetensors" if name == "alone" else saved.name))
        torch.testing.assert_close(output_of(base, tmp_path / name), expected, rtol=0, atol=0)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(output_of(base, tmp_path / "whole"), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output_of(base, tmp_path / "whole" / "unet"), expected, rtol=1e-4, atol=1e-5)


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of diffusers before peft: attention processors with linear layers of their own."""
    old = {}
    for key, part in weights.items():
        key = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            key = key.replace(f".{layer}.lora.", f".processor.{layer.removesuffix('.0')}_lora.")
        old[key] = part
    return old


def test_peft_folders_with_patterns_and_dropout(base: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    network: Any = UNet2DConditionModel.from_pretrained(base / "unet")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=r".*attn2\.to_[qk]", lora_dropout=0.1, init_lora_weights="gaussian")
    adapted: Any = get_peft_model(network, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "lora")
    adapted.eval()
    found = output_of(base, tmp_path)  # its lora/ is looked into
    prior = load_prior(base, steps=5, scheduler="ddim", prompts=Prompts(tuple(PROMPTS), guidance=1.0))
    assert prior.condition_table is not None
    words = prior.condition_table.tensors["encoder_hidden_states"]
    state = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live = adapted(state, torch.tensor([500, 300]), words).sample
    torch.testing.assert_close(found, live, rtol=1e-5, atol=1e-5)


def test_what_is_refused(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    prior = load_prior(base, steps=5, scheduler="ddim", prompts=Prompts(tuple(PROMPTS), guidance=1.0))
    weights = load_file(loras["trained"] / "pytorch_lora_weights.safetensors")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_lora_weights.bin").write_bytes(b"\x80")
    (tmp_path / "nothing").mkdir()
    first = next(iter(weights))
    for name, state in (
        ("encoder", weights | {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}),
        ("ranks", {**weights, first: torch.ones(7, weights[first].shape[1])}),
        ("other", {key.replace("attn1", "attn9"): part for key, part in weights.items()}),
    ):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "pytorch_lora_weights.safetensors")
    for name, said in (
        ("missing", "is no folder"),
        ("nothing", "holds no policy"),
        ("pickle", "a pickle, which can run code"),
        ("encoder", "changes text_encoder too"),
        ("ranks", "ranks"),
        ("other", "does not fit"),
    ):
        with pytest.raises(ValueError, match=said):
            load_foreign_policy(prior, tmp_path / name)


def test_the_closest_alpha_of_gaussians() -> None:
    """A standard normal tilted by E = x at alpha is N(-1/alpha, 1), and moves by 1/(2 alpha²) nats; any policy of that mean
    energy has the same closest alpha."""
    generator = torch.Generator().manual_seed(0)
    prior = torch.randn(200_000, generator=generator)
    for alpha in (0.5, 2.0):
        for width in (1.0, 0.3):
            found = closest_alpha([width * torch.randn(100_000, generator=generator) - 1 / alpha], [prior])
            assert found.alpha == pytest.approx(alpha, rel=0.03) and not found.beyond
        assert least_kl(prior, alpha) == pytest.approx(1 / (2 * alpha**2), rel=0.05)
    assert closest_alpha([prior[:1000] + 0.5], [prior]).alpha == math.inf  # higher energies than the prior's
    far = closest_alpha([prior[:1000] - 9.0], [prior])
    assert far.beyond and far.effective >= 30 and far.alpha > 1 / 9
    # Two laws together: the mean over both is matched, not either one.
    both = closest_alpha([prior[:50_000] - 0.5, prior[50_000:100_000] - 1.5], [prior, prior])
    assert both.alpha == pytest.approx(1.0, rel=0.03)


def test_a_collapsed_policy_is_called_so(tiltune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits network, trained on one of its own pictures until it draws hardly anything else."""
    from diffusers import DDPMScheduler, UNet2DModel

    prior = load_task("digits").load_prior(PriorConfig(steps=20))
    picture = Policy(prior, prior.denoiser).sample(1, seed=3)
    network: Any = UNet2DModel.from_pretrained(FOLDER / "unet", torch_dtype=torch.float32)
    scheduler: Any = DDPMScheduler.from_pretrained(FOLDER / "scheduler")
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        clean, noise = picture.expand(32, -1, -1, -1), torch.randn(32, 1, 8, 8, generator=generator)
        step = torch.randint(1000, (32,), generator=generator)
        output = network(scheduler.add_noise(clean, noise, step), step).sample
        loss = (output - scheduler.get_velocity(clean, noise, step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.save_pretrained(tmp_path / "one")
    digit = int(judge()(picture).argmax())
    drawn: list[Any] = []
    whole = rows_picture.rows_figure
    monkeypatch.setattr(rows_picture, "rows_figure", lambda judged: drawn.extend(judged) or whole(judged))
    chain = ["--steps", "20", "--size", "200", "--out", tmp_path / "out"]
    shown = tiltune("audit", "digits", "--policy", tmp_path / "one", "--energy", f"classes({digit})", *chain)
    assert shown.status == 1 and "It collapsed" in shown.out, shown.out + shown.err
    found = json.loads((tmp_path / "out" / "audit.json").read_text())["conditions"][0]
    assert found["diversity"] < 0.5 and math.isfinite(found["alpha"]) and found["kl_to_prior"] > 3 * found["least_kl"]
    assert [side.alpha for _, _, side in drawn] == [found["alpha"]]  # the picture shows that tilt
