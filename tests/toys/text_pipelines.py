"""Tiny text-to-image pipelines with random weights, genuine in every part, built from their configs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

LENGTH = 16  # tokens of a prompt, at most
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(folder: Path) -> tuple[Any, int]:
    """A CLIP tokenizer of single letters, and its number of tokens."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    return CLIPTokenizer(**files, model_max_length=LENGTH), len(vocabulary)


def seeded_tokenizer(out: Path) -> tuple[Any, int]:
    """`tokenizer` beside the folder ``out``; the weights that are made after it are the same every time."""
    torch.manual_seed(0)
    return tokenizer(out.with_name("tokens"))


def _text_config(tokens: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    ends = {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextConfig(vocab_size=tokens, max_position_embeddings=LENGTH, **ends, **sizes, **more)


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **more,
    )


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **more,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
        latent_channels=4,
    )


def stable_diffusion(out: Path, scheduler: Any) -> Path:
    """A `StableDiffusionPipeline` in the folder ``out``."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    words, tokens = seeded_tokenizer(out)
    text = CLIPTextModel(_text_config(tokens))
    parts = {"text_encoder": text, "tokenizer": words, "unet": _unet(cross_attention_dim=16), "vae": _vae()}
    none: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **none, scheduler=scheduler).save_pretrained(out)
    return out


def stable_diffusion_xl(out: Path, scheduler: Any) -> Path:
    """A `StableDiffusionXLPipeline` in the folder ``out``."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words, tokens = seeded_tokenizer(out)
    config = partial(_text_config, tokens, projection_dim=16)
    unet = _unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    texts = {"text_encoder": CLIPTextModel(config()), "text_encoder_2": CLIPTextModelWithProjection(config())}
    parts: Any = {**texts, "tokenizer": words, "tokenizer_2": words, "unet": unet, "vae": _vae(), "scheduler": scheduler}
    StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(out)
    return out


def stable_diffusion_3(out: Path, scheduler: Any) -> Path:
    """A `StableDiffusion3Pipeline` without its third text encoder in the folder ``out``."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    words, tokens = seeded_tokenizer(out)
    config = partial(_text_config, tokens, projection_dim=16)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    texts = {"text_encoder": CLIPTextModelWithProjection(config()), "text_encoder_2": CLIPTextModelWithProjection(config())}
    none = {"text_encoder_3": None, "tokenizer_3": None}
    parts: Any = {**texts, **none, "tokenizer": words, "tokenizer_2": words, "vae": _vae(shift_factor=0.06, scaling_factor=1.5)}
    StableDiffusion3Pipeline(**parts, transformer=transformer, scheduler=scheduler).save_pretrained(out)
    return out


def flux(out: Path, scheduler: Any, *, guidance_embeds: bool = True) -> Path:
    """A `FluxPipeline` in the folder ``out``."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

    words, tokens = seeded_tokenizer(out)
    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    pieces = T5Tokenizer(
        [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters], extra_ids=0, model_max_length=LENGTH
    )
    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    texts: Any = {"text_encoder": CLIPTextModel(_text_config(tokens)), "text_encoder_2": T5EncoderModel(T5Config(**sizes))}
    parts: Any = {**texts, "tokenizer": words, "tokenizer_2": pieces, "vae": _vae(shift_factor=0.06, scaling_factor=1.5)}
    FluxPipeline(**parts, transformer=transformer, scheduler=scheduler).save_pretrained(out)
    return out
