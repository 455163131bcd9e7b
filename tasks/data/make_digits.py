"""Train the digits priors and their two classifiers: `python -m tiltune.tasks.data.make_digits prior|labels|classifiers`.

Data: the 1,797 handwritten digits of 8 x 8 pixels in scikit-learn's wheel (UCI, E. Alpaydin and C. Kaynak, CC BY 4.0), scaled
from 0..16 to [-1, 1]. Training runs for minutes on one core and is never part of a test.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..classifier import SmallClassifier
from ..digits import FOLDER, LABELLED

if TYPE_CHECKING:
    from diffusers import UNet2DModel

PIXELS = 16.0
WRONG = 0.7  # share of labels drawn at random, so that a label is a weak condition, and the tilt toward its digit a real one


def dataset() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] and their classes [1797]."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports] - `pip install scikit-learn` for this script

    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / (PIXELS / 2) - 1
    return images, torch.tensor(digits.target)


def make_network(labels: int | None) -> UNet2DModel:
    """Fresh weights; ``labels`` as in `train_prior`."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=labels,
    )


def train_prior(
    folder: Path = FOLDER,
    labels: int | None = None,
    seconds: float = 480.0,
    batch: int = 128,
    lr: float = 2e-3,
    ema: float = 0.999,
) -> None:
    """v-prediction on the cosine schedule, mean squared error over even timesteps, averaged weights saved in float16.

    labels: how many classes the network is conditioned on, None for none; a share `WRONG` of them is replaced by random ones in
    each batch. Trailing spacing starts at the last timestep, where nothing is left of the data: a start that the chain forgets.
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    torch.manual_seed(0)
    images, classes = dataset()
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        variance_type="fixed_large",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    network = make_network(labels)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema))
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=1e-3)
    started, update = time.time(), 0
    while (passed := time.time() - started) < seconds:
        progress = passed / seconds
        optimizer.param_groups[0]["lr"] = lr * min(1.0, update / 200) * (1 - progress) ** 0.7
        chosen = torch.randint(len(images), (batch,))
        clean = images[chosen]
        condition = {}
        if labels is not None:
            other = torch.rand(batch) < WRONG
            condition["class_labels"] = torch.where(other, torch.randint(labels, (batch,)), classes[chosen])
        step: Any = torch.randint(1000, (batch,))
        noise = torch.randn_like(clean)
        state = scheduler.add_noise(clean, noise, step)
        loss = (network(state, step, **condition).sample - scheduler.get_velocity(clean, noise, step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        update += 1
        if update % 200 == 0:
            print(f"{update} loss {loss.item():.4f}  {passed:.0f} s", flush=True)
    averaged: Any = average.module.eval().half()
    pipeline = DDPMPipeline(averaged, scheduler)
    pipeline.save_pretrained(folder)


def train_classifier(half: int, width: int, seed: int, smoothing: float, epochs: int = 150) -> SmallClassifier:
    """On every second image, with pixel noise; prints the accuracy on the other half."""
    torch.manual_seed(seed)
    images, classes = dataset()
    mine, other = (torch.arange(side, len(images), 2) for side in (half, 1 - half))
    network = SmallClassifier(8, width)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - epoch / epochs)
        for part in mine[torch.randperm(len(mine))].split(64):
            noisy = images[part] + 0.15 * torch.randn_like(images[part])
            loss = torch.nn.functional.cross_entropy(network(noisy), classes[part], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.requires_grad_(False).eval()
    accuracy = (network(images[other]).argmax(1) == classes[other]).float().mean().item()
    print(f"width {width}: accuracy {accuracy:.4f} on the {len(other)} images that it has not seen")
    return network


def train_classifiers() -> None:
    """Smoothed labels bound the energy at about 5 nats, as an honest classifier of real digits should."""
    train_classifier(half=0, width=16, seed=1, smoothing=0.05).save(FOLDER / "classifier")
    train_classifier(half=1, width=24, seed=2, smoothing=0.0).save(FOLDER / "judge")


if __name__ == "__main__":
    torch.set_num_threads(1)
    makers = {"prior": train_prior, "labels": lambda: train_prior(LABELLED, labels=10), "classifiers": train_classifiers}
    makers[sys.argv[1]]()
