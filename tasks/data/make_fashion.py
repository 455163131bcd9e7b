"""Make the fashion task's files: `python -m tiltune.tasks.data.make_fashion prior|classifiers|heldout`.

Data: Fashion-MNIST (Zalando SE, MIT licence), 60,000 training and 10,000 test images, from Debian's package: `apt-get install
dataset-fashion-mnist`. Images are reduced from 28 x 28 to 16 x 16 pixels (bilinear, antialiased) and scaled to [-1, 1].

`prior` takes about 15 minutes on one core, `classifiers` about two, `heldout` a second; none is part of a test.
"""

from __future__ import annotations

import gzip
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..classifier import SmallClassifier, predicted
from ..fashion import FOLDER

SOURCE = Path("/usr/share/datasets/fashion-mnist")
SIZE = 16


def dataset(part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 16, 16] in [-1, 1] and classes [N] of 'train' (60,000) or 't10k' (10,000)."""

    def read(name: str, header: int) -> np.ndarray:
        path = SOURCE / f"{part}-{name}.gz"
        if not path.is_file():
            raise ValueError(f"{path} is missing; install the data with `apt-get install dataset-fashion-mnist`.")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy()

    labels = torch.from_numpy(read("labels-idx1-ubyte", 8)).long()
    pixels = torch.from_numpy(read("images-idx3-ubyte", 16)).reshape(len(labels), 1, 28, 28).float() / 127.5 - 1
    return torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True).clamp(-1, 1), labels


def train_prior(updates: int = 7000, batch: int = 64, lr: float = 2e-3, ema: float = 0.999) -> None:
    """v-prediction on the cosine schedule, mean squared error over even timesteps, averaged weights saved in float16."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    images, _ = dataset("train")
    # Trailing: a chain that starts at the last timestep forgets its start; leading, at K = 20, keeps 15% of the widest direction.
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        variance_type="fixed_large",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    # Few channels at full size, where most of the time goes: 500 rows a second forward and backward on one core.
    network = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema))
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=1e-3)
    started = time.time()
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, update / 200) * (1 - update / updates) ** 0.7
        clean = images[torch.randint(len(images), (batch,))]
        step: Any = torch.randint(1000, (batch,))
        noise = torch.randn_like(clean)
        state = scheduler.add_noise(clean, noise, step)
        loss = (network(state, step).sample - scheduler.get_velocity(clean, noise, step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        if update % 200 == 0 or update == updates - 1:
            print(f"{update} loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True)
    averaged: Any = average.module.eval().half()
    DDPMPipeline(averaged, scheduler).save_pretrained(FOLDER)


def train_classifier(name: str, part: slice, width: int, seed: int, epochs: int = 20, batch: int = 128) -> None:
    """Cross-entropy on one half of the training images, slightly moved and noised, so that it is calm off the data."""
    torch.manual_seed(seed)
    images, labels = (tensor[part] for tensor in dataset("train"))
    classifier = SmallClassifier(SIZE, width)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        index = torch.randint(len(images), (batch,))
        moved = torch.roll(images[index], tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        noised = moved + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(moved)
        loss = torch.nn.functional.cross_entropy(classifier(noised), labels[index], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"{name} {step} of {steps} loss {loss.item():.3f}", flush=True)
    classifier.save(FOLDER / name)
    images, labels = dataset("t10k")
    share = (predicted(SmallClassifier.load(FOLDER / name), images) == labels).double().mean().item()
    print(f"{name}: {share:.4f} of the test images right", flush=True)


def keep_heldout() -> None:
    """The first test image of each class, as bytes."""
    from safetensors.torch import save_file

    images, labels = dataset("t10k")
    first = torch.stack([images[(labels == label).nonzero()[0, 0]] for label in range(10)])
    save_file({"images": ((first + 1) * 127.5).round().to(torch.uint8)}, FOLDER / "heldout.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["prior"]:
        train_prior()
    elif sys.argv[1:] == ["classifiers"]:
        train_classifier("classifier", slice(0, 30_000), width=16, seed=1)
        train_classifier("judge", slice(30_000, 60_000), width=20, seed=2)
    elif sys.argv[1:] == ["heldout"]:
        keep_heldout()
    else:
        sys.exit(__doc__)
