"""LoRAs as other toolkits save them, for each family, against plain diffusers that loads the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from tests.toys.text_pipelines import BETAS, flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiltune.samplers.loading.folder import left_empty
from tiltune.samplers.loading.foreign import load_foreign_policy
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.loading.text import Prompts
from tiltune.samplers.prior import Prior

FILE = "pytorch_lora_weights.safetensors"
DDIM = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
FLOW = FlowMatchEulerDiscreteScheduler()
FAMILIES: dict[str, tuple[Callable[..., Path], Any, str]] = {
    "sd": (stable_diffusion, DDIM, "unet"),
    "sdxl": (stable_diffusion_xl, DDIM, "unet"),
    "sd3": (stable_diffusion_3, FLOW, "transformer"),
    "flux": (flux, FLOW, "transformer"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    build, scheduler, part = FAMILIES[request.param]
    return build(tmp_path_factory.mktemp(request.param) / "base", scheduler), part


def prior_of(base: Path) -> Prior:
    return load_prior(base, steps=3, prompts=Prompts(("a cat",), guidance=1.0))


def adapted(base: Path, part: str) -> dict[str, Tensor]:
    """An adapter of rank 4 that does something, under peft's names."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(base, **dict.fromkeys(left_empty(base)))
    network = getattr(pipeline, part)
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"]))
    state = get_peft_model_state_dict(network)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(weight.shape, generator=generator) for key, weight in state.items()}


def effect(prior: Prior, folder: Path) -> dict[str, Tensor]:
    """By layer, what is added to its weights: scaling · B A, of Tiltune's policy."""
    policy: Any = load_foreign_policy(prior, folder)
    name = policy.denoiser.name
    return {
        layer: (module.scaling[name] * module.lora_B[name].weight @ module.lora_A[name].weight).detach()
        for layer, module in policy.denoiser.layers().items()
    }


def effect_in_diffusers(base: Path, part: str, folder: Path) -> dict[str, Tensor]:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(base, **dict.fromkeys(left_empty(base)))
    pipeline.load_lora_weights(folder, weight_name=FILE, adapter_name="a")
    return {
        layer: (module.scaling["a"] * module.lora_B["a"].weight @ module.lora_A["a"].weight).detach()
        for layer, module in getattr(pipeline, part).named_modules()
        if hasattr(module, "lora_A") and "a" in module.lora_A
    }


def assert_same(base: Path, part: str, folder: Path) -> None:
    mine, live = effect(prior_of(base), folder), effect_in_diffusers(base, part, folder)
    assert mine.keys() == live.keys() and len(mine) > 1
    for layer, added in mine.items():
        assert added.abs().max() > 0
        torch.testing.assert_close(added, live[layer], rtol=1e-5, atol=1e-6)


def test_what_a_pipeline_saves(family: tuple[Path, str], tmp_path: Path) -> None:
    base, part = family
    state = adapted(base, part)
    save_file({f"{part}.{key}": weight for key, weight in state.items()}, tmp_path / FILE)
    assert_same(base, part, tmp_path)


def test_alphas_that_flux_hands_out_apart(tmp_path: Path) -> None:
    """Beside each layer an alpha of 1 at rank 4: a quarter of the strength."""
    base = flux(tmp_path / "base", FLOW)
    saved = {f"transformer.{key}": weight for key, weight in adapted(base, "transformer").items()}
    layers = {key.split(".lora_")[0] for key in saved}
    (tmp_path / "lora").mkdir()
    save_file(saved | {f"{layer}.alpha": torch.tensor(1.0) for layer in layers}, tmp_path / "lora" / FILE)
    assert_same(base, "transformer", tmp_path / "lora")


@pytest.mark.parametrize("build", [stable_diffusion, stable_diffusion_xl])
def test_kohyas_names(build: Callable[..., Path], tmp_path: Path) -> None:
    base = build(tmp_path / "base", DDIM)
    state = adapted(base, "unet")
    kohya: dict[str, Tensor] = {}
    for key, weight in state.items():
        layer, factor = key.rsplit(".lora_", 1)
        side = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[factor]
        kohya[f"lora_unet_{layer.replace('.', '_')}.{side}"] = weight
        kohya[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(2.0)
    (tmp_path / "kohya").mkdir()
    save_file(kohya, tmp_path / "kohya" / FILE)
    assert_same(base, "unet", tmp_path / "kohya")


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"alpha_pattern": {"to_q": 16}}])
def test_what_changes_an_adapter_besides_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """In the metadata of a pipeline's file; told as rank and alpha, it is taken."""
    from diffusers import StableDiffusionPipeline

    base = stable_diffusion(tmp_path / "base", DDIM)
    state = adapted(base, "unet")
    told = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_k"]}
    for name, metadata in (("plain", told), ("changed", told | changes)):
        StableDiffusionPipeline.save_lora_weights(tmp_path / name, state, unet_lora_adapter_metadata=metadata)
    assert_same(base, "unet", tmp_path / "plain")
    with pytest.raises(ValueError, match=f"sets {next(iter(changes))}"):
        load_foreign_policy(prior_of(base), tmp_path / "changed")


def test_a_beginning_that_changes_the_base_is_refused(tmp_path: Path) -> None:
    """PiSSA takes what the adapter begins with out of the base's weights."""
    from diffusers import UNet2DConditionModel
    from peft import get_peft_model

    base = stable_diffusion(tmp_path / "base", DDIM)
    for start in ("pissa", "gaussian"):
        network: Any = UNet2DConditionModel.from_pretrained(base / "unet")
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=start)
        get_peft_model(network, config).save_pretrained(tmp_path / start)
    load_foreign_policy(prior_of(base), tmp_path / "gaussian")
    with pytest.raises(ValueError, match="init_lora_weights = 'pissa'"):
        load_foreign_policy(prior_of(base), tmp_path / "pissa")
