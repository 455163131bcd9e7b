"""What bf16 does to the log-ratio at the size of a latent text-to-image model: 4 x 64 x 64, K = 50, LoRA on one base."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ...samplers.condition import ConditionTable
from ...samplers.denoiser import DiffusersDenoiser
from ...samplers.log_ratio import outputs, shift_moments, step_log_ratio
from ...samplers.make_policy import make_policy
from ...samplers.prior import Prior
from ...samplers.rollout import rollout
from ...samplers.schedulers.dispatch import chain_from_scheduler

SHAPE, STEPS, BATCH = (4, 64, 64), 50, 2
MOVES = (0.0, 3e-5, 1e-3, 1e-2)  # standard deviations of the adapters' second factor; 0: as they start


def half_precision(device: str) -> list[dict[str, Any]]:
    """A row for each size of the move: |Λ| of bf16 networks, its distance from that of float32 networks on the same states,
    and KL(policy || prior) = E Σ ½|δ|² by both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks: Any = {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        sizes: Any = {"sample_size": SHAPE[-1], "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16}
        network: Any = UNet2DConditionModel(**blocks, **sizes, layers_per_block=1)
        network.to(device)
        words = torch.randn(1, 8, 16, device=device)
    chain = chain_from_scheduler(DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), STEPS, eta=1.0)
    denoiser = DiffusersDenoiser(network, autocast=torch.bfloat16)
    prior = Prior(denoiser, chain, SHAPE, condition_table=ConditionTable(("words",), {"encoder_hidden_states": words}))
    policy = make_policy(prior, "lora", rank=4)
    return [_row(prior, policy, denoiser, size, device) for size in MOVES]


@torch.no_grad()
def _row(prior: Prior, policy: Any, denoiser: DiffusersDenoiser, size: float, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
    denoiser.autocast = torch.bfloat16
    drawn = rollout(prior, policy, BATCH, torch.Generator(device).manual_seed(0))
    assert drawn.step_log_ratio is not None
    own, kl = drawn.step_log_ratio.sum(0), _kl(prior, policy, drawn)
    denoiser.autocast = None
    exact = step_log_ratio(prior.chain, denoiser, policy, drawn).sum(0)
    return {
        "move": size,
        "log_ratio": own.abs().mean().item(),
        "error": (own - exact).abs().mean().item(),
        "kl": kl,
        "kl_float32": _kl(prior, policy, drawn),
    }


def _kl(prior: Prior, policy: Any, drawn: Any) -> float:
    """Mean of Σ ½|δ|² over the trajectories."""
    found = shift_moments(prior.chain, policy, drawn, outputs(prior.chain, prior.denoiser, drawn))
    return found[1].mean().item()
