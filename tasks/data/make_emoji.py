"""Train the emoji prior, part by part: `python -m tiltune.tasks.data.make_emoji PACKAGE autoencoder|prior|classifiers`.

PACKAGE: the folder package/ of the unpacked `npm pack emoji-datasource-google@16.0.0`. The parts are made in this order; each
takes minutes to an hour on two cores, and is never part of a test. The result is a `StableDiffusionPipeline` like any other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..classifier import SmallClassifier
from .emoji_pictures import Pictures, read_pictures

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

FOLDER = Path(__file__).parent / "emoji"
TOKENS, WIDTH = 16, 64  # tokens of a prompt, at most; numbers of a token's embedding
SHARES = (0.4, 0.25, 0.25, 0.1)  # of prompts while training: name, subcategory, category, none: what guidance asks for


def make_autoencoder() -> AutoencoderKL:
    """Fresh weights: 3 x 32 x 32 pixels to 4 x 8 x 8 latents and back."""
    from diffusers import AutoencoderKL

    blocks: Any = {
        "block_out_channels": (16, 48, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(**blocks, norm_num_groups=8, layers_per_block=1, latent_channels=4, sample_size=32)


def make_tokenizer(words: list[str], folder: Path) -> tuple[CLIPTokenizer, int]:
    """A byte-pair tokenizer in which each of ``words`` is one token, any other word pieces of them; its number of tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    pairs: Any = Tokenizer(BPE(end_of_word_suffix="</w>"))
    pairs.pre_tokenizer = Whitespace()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    corpus = [*words, *letters, *(letter + other for letter in letters for other in letters)]  # each letter, inside and last
    pairs.train_from_iterator(corpus, BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    pairs.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for end in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[end] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS), len(vocabulary)


def make_text_encoder(tokens: int) -> CLIPTextModel:
    """Fresh weights: two layers of width 64."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ends: Any = {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            max_position_embeddings=TOKENS,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            **ends,
        )
    )


def make_network() -> UNet2DConditionModel:
    """Fresh weights: two resolutions, words attended to at the lower one and in the middle."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(56, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


def learning(parameters: Any, seconds: float, peak: float) -> Iterator[Callable[[Tensor], None]]:
    """Yields, until ``seconds`` have passed, a function that takes one AdamW step on a loss; the rate rises, then falls to 0."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, peak, weight_decay=1e-3)
    started, update = time.time(), 0

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if update % 200 == 0:
            print(f"update {update}  loss {loss.item():.5f}  {time.time() - started:.0f} s", flush=True)

    while (passed := time.time() - started) < seconds:
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (update + 1) / 200) * (1 - passed / seconds) ** 0.7
        yield step
        update += 1


def changed(images: Tensor, colors: bool = True) -> Tensor:
    """Some mirrored, all moved by up to two pixels; where ``colors`` is asked for, a third of the batches with other colors."""
    from torch.nn.functional import pad

    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    if colors and torch.rand(()) < 1 / 3:
        images = images[:, torch.randperm(3)]
    top, left = torch.randint(5, (2,)).tolist()
    return pad(images, (2, 2, 2, 2), value=1.0)[:, :, top : top + 32, left : left + 32]


def train_autoencoder(pictures: Pictures, seconds: float = 900.0, batch: int = 32) -> None:
    """Absolute error of pixels and of their differences to neighbors, and a little KL, so that latents may be off a little."""
    torch.manual_seed(0)
    network = make_autoencoder()
    for step in learning(network.parameters(), seconds, peak=2e-3):
        images = changed(pictures.images[torch.randint(len(pictures.images), (batch,))])
        latents: Any = network.encode(images).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        error: Any = network.decode(latents.sample()).sample - images  # pyright: ignore[reportAttributeAccessIssue]
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        step(error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges + 1e-3 * latents.kl().mean() / 256)
    with torch.no_grad():
        spread = network.encode(pictures.images).latent_dist.mode().std()  # pyright: ignore[reportAttributeAccessIssue]
    network.register_to_config(scaling_factor=round(1 / spread.item(), 4))
    network.eval().half().save_pretrained(FOLDER / "vae")


class Conditioned(nn.Module):
    """The network and the text encoder that are trained, and averaged, together."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.network, self.text = make_network(), make_text_encoder(tokens)

    def forward(self, state: Tensor, step: Tensor, ids: Tensor) -> Tensor:
        return self.network(state, step, self.text(ids).last_hidden_state).sample


def train_prior(pictures: Pictures, seconds: float = 3000.0, batch: int = 64, peak: float = 2e-3, ema: float = 0.999) -> None:
    """v-prediction on the cosine schedule over even timesteps, on latents of the saved autoencoder; prompts drawn by `SHARES`.

    Trailing spacing starts at the last timestep, where nothing is left of the data: a start that the chain forgets.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

    torch.manual_seed(1)
    vae: Any = AutoencoderKL.from_pretrained(FOLDER / "vae").float().eval()
    both = torch.cat([pictures.images, pictures.images.flip(-1)])
    with torch.no_grad():
        latents = vae.encode(both).latent_dist
    words, tokens = make_tokenizer(pictures.words(), FOLDER / "tokenizer")
    texts = [text for number in range(len(pictures.names)) for text in (*pictures.prompts(number), "")]
    ids: Any = words(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    ids = ids.reshape(len(pictures.names), len(SHARES), TOKENS)
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        variance_type="fixed_large",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    model = Conditioned(tokens)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema))
    for step in learning(model.parameters(), seconds, peak):
        chosen = torch.randint(len(both), (batch,))
        clean = (latents.mean + latents.std * torch.randn_like(latents.mean))[chosen] * vae.config.scaling_factor
        prompts = ids[chosen % len(pictures.names), torch.multinomial(torch.tensor(SHARES), batch, replacement=True)]
        timestep: Any = torch.randint(1000, (batch,))
        noise = torch.randn_like(clean)
        state = scheduler.add_noise(clean, noise, timestep)
        step((model(state, timestep, prompts) - scheduler.get_velocity(clean, noise, timestep)).square().mean())
        average.update_parameters(model)
    kept: Any = average.module.eval().half()
    none: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts: Any = {"vae": vae.half(), "text_encoder": kept.text, "tokenizer": words, "unet": kept.network, "scheduler": scheduler}
    StableDiffusionPipeline(**parts, **none).save_pretrained(FOLDER)
    config = FOLDER / "vae" / "config.json"  # diffusers writes down where it was loaded from
    told = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
    config.write_text(json.dumps(told, indent=2) + "\n")


def train_classifier(pictures: Pictures, labels: list[str], width: int, seed: int, seconds: float = 240.0) -> SmallClassifier:
    """On all pictures, mirrored, moved and noisy, with smoothed labels: it has seen all there are."""
    torch.manual_seed(seed)
    classes = sorted(set(labels))
    wanted = torch.tensor([classes.index(label) for label in labels])
    network = SmallClassifier(32, width, len(classes), channels=3)
    for step in learning(network.parameters(), seconds, peak=2e-3):
        chosen = torch.randint(len(wanted), (64,))
        noisy = changed(pictures.images[chosen], colors=False)
        noisy = noisy + 0.3 * torch.rand(64, 1, 1, 1) * torch.randn_like(noisy)
        step(nn.functional.cross_entropy(network(noisy), wanted[chosen], label_smoothing=0.05))
    network.requires_grad_(False).eval()
    right = (network(pictures.images).argmax(1) == wanted).float().mean().item()
    print(f"{len(classes)} classes: {right:.4f} of the pictures right")
    return network


def train_classifiers(pictures: Pictures) -> None:
    """One of the four categories, for the energy; one of the 31 subcategories, which judges what a prompt gave."""
    train_classifier(pictures, list(pictures.categories), width=12, seed=2).save(FOLDER / "classifier")
    train_classifier(pictures, list(pictures.subcategories), width=16, seed=3).save(FOLDER / "judge")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]) if sys.argv[3:] else 1)
    makers = {"autoencoder": train_autoencoder, "prior": train_prior, "classifiers": train_classifiers}
    makers[sys.argv[2]](read_pictures(Path(sys.argv[1])))
