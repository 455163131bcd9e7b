"""What a user of another toolkit would have: REINFORCE on a LoRA in plain diffusers and peft, without any KL to the base.

python tests/toys/plain_policy_gradient.py PIPELINE OUT --prompts "a" "b" [--updates 30] [--steps 10] [--lr 1e-3] [--batch 16]

The reward is redness; log-probabilities are those of DDIM with eta = 1, as in DDPO. It imports nothing of Tiltune.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def redness(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = (images / 2 + 0.5).clamp(0, 1).unbind(1)
    return (red - (green + blue) / 2).mean((1, 2))


def gaussian(scheduler: Any, output: torch.Tensor, t: int, state: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
    """(mean, standard deviation) of DDIM's step with eta = 1 (arXiv 2010.02502, eq. 12 and 16)."""
    before = t - scheduler.config.num_train_timesteps // steps
    a, b = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    if scheduler.config.prediction_type == "v_prediction":
        clean, noise = a.sqrt() * state - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * state
    else:
        clean, noise = (state - (1 - a).sqrt() * output) / a.sqrt(), output
    std = ((1 - b) / (1 - a) * (1 - a / b)).clamp(min=0).sqrt().item()
    return b.sqrt() * clean + (1 - b - std**2).clamp(min=0).sqrt() * noise, std


def train(pipeline: Any, prompts: list[str], *, updates: int, steps: int, lr: float, batch: int, rank: int = 4) -> None:
    """Put a LoRA into the pipeline's unet and train it."""
    torch.manual_seed(0)
    unet, scheduler = pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr)
    with torch.no_grad():
        words = pipeline.encode_prompt(prompts, "cpu", math.ceil(batch / len(prompts)), False)[0][:batch]
    for _ in range(updates):
        state, path = torch.randn(batch, *(unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)), []
        with torch.no_grad():
            for t in scheduler.timesteps.tolist():
                mean, std = gaussian(scheduler, unet(state, t, words).sample, t, state, steps)
                after = mean + std * torch.randn_like(mean)
                path, state = [*path, (t, state, after, std)], after
            reward = redness(pipeline.vae.decode(state / pipeline.vae.config.scaling_factor).sample)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        for t, state, after, std in path:
            if std == 0:
                continue
            mean, _ = gaussian(scheduler, unet(state, t, words).sample, t, state, steps)
            log_density = -((after - mean).square() / (2 * std**2)).flatten(1).sum(1)
            (-(advantage * log_density).mean() / len(path)).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline")
    parser.add_argument("out")
    parser.add_argument("--prompts", nargs="+", required=True)
    for name, kind, value in (("updates", int, 30), ("steps", int, 10), ("lr", float, 1e-3), ("batch", int, 16)):
        parser.add_argument(f"--{name}", type=kind, default=value)
    options = vars(parser.parse_args())
    loaded = StableDiffusionPipeline.from_pretrained(options.pop("pipeline"), torch_dtype=torch.float32)
    out = options.pop("out")
    train(loaded, options.pop("prompts"), **options)
    StableDiffusionPipeline.save_lora_weights(out, get_peft_model_state_dict(loaded.unet))
