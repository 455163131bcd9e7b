"""The figures of the emoji prior's model card: `python -m tiltune.tasks.data.measure_emoji PACKAGE [--steps 20] [--guidance 1]`.

PACKAGE as for `make_emoji`. It prints the autoencoder's error, the Fréchet distance of samples to the pictures beside that of the
pictures' halves to each other, and the share of samples that the judge finds to be what the prompt says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...finetune.config.prior import PriorConfig
from ...samplers.policy import Policy
from ..classifier import SmallClassifier
from ..emoji import FOLDER, judge, load_prior
from ..metrics.principal_components import frechet
from .emoji_pictures import Pictures, read_pictures


def features(network: SmallClassifier, images: Tensor) -> Tensor:
    """Of images [N, 3, 32, 32] the last convolution's channels, averaged over the picture [N, 2 · width]."""
    with torch.no_grad():
        return torch.cat([network.layers[:-2](part).mean((2, 3)) for part in images.split(256)])


def reconstruction(pictures: Pictures) -> float:
    """Mean squared error of pixels in [-1, 1], there and back through the autoencoder."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        back = vae.decode(vae.encode(pictures.images).latent_dist.mode()).sample.clamp(-1, 1)
    return (back - pictures.images).square().mean().item()


def drawn(prompts: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """One sample for each of the prompts, which may repeat, in their order."""
    texts = tuple(dict.fromkeys(prompts))
    prior = load_prior(PriorConfig(steps=steps, prompts=texts, guidance=guidance))
    from ...samplers.condition import Condition

    assert prior.condition_table is not None
    rows = torch.tensor([texts.index(prompt) for prompt in prompts])
    policy = Policy(prior, prior.denoiser)
    return policy.sample(len(prompts), seed=seed, condition=Condition(prior.condition_table, rows)).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("package", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures, network = read_pictures(options.package), judge()
    classes = sorted(set(pictures.subcategories))
    category = dict(zip(pictures.subcategories, pictures.categories, strict=True))
    print(f"reconstruction: mean squared error {reconstruction(pictures):.4f} of pixels in [-1, 1]")
    both = torch.cat([pictures.images, pictures.images.flip(-1)])
    real = features(network, both)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    print(f"Fréchet distance of two halves of the pictures: {frechet(real[order[::2]], real[order[1::2]]):.3f}")
    for level, texts in (("name", pictures.names), ("subcategory", pictures.subcategories), ("category", pictures.categories)):
        samples = drawn([*texts, *texts], options.steps, options.guidance, seed=1)
        with torch.no_grad():
            found = [classes[index] for index in network(samples).argmax(1).tolist()]
        wanted = [*(pictures.categories if level == "category" else pictures.subcategories)] * 2
        said = [category[one] for one in found] if level == "category" else found
        right = sum(one == other for one, other in zip(said, wanted, strict=True)) / len(wanted)
        distance = frechet(features(network, samples), real)
        print(f"{level}: Fréchet distance to the pictures {distance:.3f}, {right:.3f} are what the prompt says", flush=True)


if __name__ == "__main__":
    main()
