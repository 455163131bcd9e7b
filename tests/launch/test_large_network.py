"""Large networks train on a CPU within the memory that is said before they begin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from tests.toys.text_pipelines import BETAS, seeded_tokenizer

MEASURE = """
import resource, sys
from tiltune.launch import cli
status = cli.run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
raise SystemExit(status)
"""
ON_POLICY = ["--warm-start", "none", "--behavior", "on_policy", "1.0", "--soft-value-updates", "0", "--forward-rows", "0"]


def trained(folder: Path, *arguments: Any) -> tuple[float, float]:
    """(peak in GB, what was expected) of a training in a process of its own."""
    (folder / "dark.py").write_text("def dark(x):\n    return 10 * x.flatten(1).mean(1)\n")
    energy = ["--energy", f"{folder / 'dark.py'}:dark", "--objective", "log_variance", "--out", folder / "run"]
    command = [sys.executable, "-c", MEASURE, "train", "--prior", folder / "prior", *energy, *ON_POLICY, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = re.search(r"memory: about ([0-9.]+) GB at the peak", done.stdout)
    assert expected is not None, done.stdout
    peak = float(done.stdout.split("peak")[-1])
    print(f"{arguments}: peak {peak:.2f} GB, expected {expected[1]}")
    return peak, float(expected[1])


@pytest.mark.slow
def test_a_hundred_million_parameters_train_within_8_gb(tmp_path: Path) -> None:
    """Two updates at K = 50 on batches of two; what is said before is right within a fifth, and K hardly matters."""
    network = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), layers_per_block=2
    )
    assert 95e6 < sum(weight.numel() for weight in network.parameters()) < 130e6
    DDPMPipeline(network, DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "prior")
    del network
    peaks = {}
    for steps in (10, 50):
        peaks[steps], expected = trained(tmp_path, "--steps", steps, "--updates", 2, "--batch-size", 2, "--overwrite")
        assert json.loads((tmp_path / "run" / "run.json").read_text())["updates"] == 2
        assert peaks[steps] == pytest.approx(expected, rel=0.2)
    assert peaks[50] < 8 and peaks[50] < 1.1 * peaks[10]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 10])
def test_stable_diffusion_in_its_own_size_takes_an_update_within_16_gb(tmp_path: Path, steps: int) -> None:
    """The UNet and the decoder of Stable Diffusion 1.5 with random weights; LoRA, a group of two, guidance 7.5. Two steps
    are for whoever has less time."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    words, tokens = seeded_tokenizer(tmp_path / "prior")
    text: Any = CLIPTextConfig(
        vocab_size=tokens, hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1024
    )
    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert 855e6 < sum(weight.numel() for weight in network.parameters()) < 865e6
    blocks: Any = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4, sample_size=512)
    parts: Any = {"unet": network, "vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": words}
    none: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler: Any = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(**parts, **none, scheduler=scheduler).save_pretrained(tmp_path / "prior")
    del network, vae, parts
    asked = ["--prompts", "a cat", "--policy", "lora", "--rank", 4, "--updates", 1, "--batch-size", 2, "--threads", 2]
    peak, expected = trained(tmp_path, "--steps", steps, *asked, "--gradient-checkpointing")
    assert peak < 16 and peak == pytest.approx(expected, rel=0.2)
