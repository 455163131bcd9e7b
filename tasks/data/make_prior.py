"""Pretrain the shipped MLP priors of the mixture task: python -m tiltune.tasks.data.make_prior {vp,flow,brownian} [out]

The target of the regression is the exact E[x | s] of the 25-mode mixture (the average of x over its known conditional),
weighted by the path KL per label, so that what remains is the network's own error. About 10 minutes on one core each.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from ...samplers.chain import Chain
from ...samplers.mlp import MLPDenoiser, precondition_for_
from ...samplers.schedulers.brownian import brownian_chain
from ...samplers.schedulers.dispatch import chain_from_scheduler
from ..mixture_chains import DATA, in_states
from ..mixture_target import prior_mixture


def fine_chain(process: str) -> Chain:
    """The process on its finest labels, which the preconditioning tables are made from."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if process == "vp":
        options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
        return chain_from_scheduler(DDPMScheduler(variance_type="fixed_large", **options), 1000)
    if process == "flow":
        return chain_from_scheduler(FlowMatchEulerDiscreteScheduler(), 1000)
    return brownian_chain(1000)


def main(process: str, out: Path, steps: int = 12000, batch: int = 2048, lr: float = 4e-3) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    chain = fine_chain(process)
    mixture = in_states(prior_mixture(), "ddpm" if process == "vp" else process)
    data_std = mixture.moments()[1].diagonal().mean().sqrt().item()
    network = precondition_for_(MLPDenoiser(), chain, data_std)
    # Path KL of an error in x_hat is ½ (d/sigma)² |error|²; labels are drawn half from it, half evenly over the chain.
    weight = ((chain.d / chain.sigma.clamp(min=1e-6)) ** 2)[: chain.num_kernels]
    spread = chain.signal[:-1] ** 2 * data_std**2 + chain.noise[:-1] ** 2
    error = (chain.noise[:-1] ** 2 / spread.clamp(min=1e-6))[: chain.num_kernels]
    scale = (weight * error).sqrt()
    density = 0.5 * scale / scale.sum() + 0.5 / chain.num_kernels
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    started = time.time()
    for update in range(steps):
        step = torch.multinomial(density, batch, replacement=True, generator=generator)
        x = mixture.sample(batch, generator)
        signal, noise = chain.signal[step], chain.noise[step]
        state = signal[:, None] * x + noise[:, None] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            clean = mixture.denoise(state.float(), signal.float(), noise.float()).double()
        (output,) = network(state.float(), chain.timesteps[step].float())
        predicted = chain.p[step, None] * state + chain.q[step, None] * output.double()
        # Importance weights keep the expectation that of the sum over steps (per step of the fine chain).
        kl = 0.5 * weight[step] / density[step] * (predicted - clean).square().sum(-1)
        loss = kl.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        if update % 500 == 0 or update == steps - 1:
            print(f"{process} {update} path KL {loss.item():.4f} nats  {time.time() - started:.0f} s", flush=True)
    network.eval().save_pretrained(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name = sys.argv[1]
    main(name, Path(sys.argv[2]) if len(sys.argv) > 2 else DATA / f"mixture_{name}")
