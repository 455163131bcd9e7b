"""Rewards of a picture and its prompt as energies: CLIP score, PickScore, HPS, ImageReward, and text read from the picture.

Each is made from a local folder and returns ``energy(x, prompts)`` → [B] float32, minus the reward. Named as
``"tiltune.finetune.energies.text_rewards:pick_score('folder')"``. Weights are safetensors in transformers' own layout; nothing
is downloaded. Pictures go through the folder's own image processor, so that a score is what the model's authors compute; it has
no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .images import to_pil

TextEnergy = Callable[..., Tensor]
HEAD = "reward_head.safetensors"  # ImageReward's head beside the weights of BLIP
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of ImageReward's scores on its authors' data, which they take out
BLIP_TOKENS = 35


def clip_score(folder: str, device: str = "cpu") -> TextEnergy:
    """E(x, prompt) = -100 cos(picture, prompt) of a CLIP model (Hessel et al. 2021, without their cut at 0 and factor 2.5)."""
    return _dual_encoder(folder, device, lambda model: 100.0)


def pick_score(folder: str, device: str = "cpu") -> TextEnergy:
    """E = -(logit scale) cos(picture, prompt): minus the score of Pick-a-Pic (arXiv 2305.01569), whose folder is a CLIP model."""
    return _dual_encoder(folder, device, lambda model: model.logit_scale.exp().item())


def hps(folder: str, device: str = "cpu") -> TextEnergy:
    """E = -cos(picture, prompt) of Human Preference Score v2 (arXiv 2306.09341), saved as transformers' CLIP model."""
    return _dual_encoder(folder, device, lambda model: 1.0)


def _dual_encoder(folder: str, device: str, scale_of: Callable[[Any], float]) -> TextEnergy:
    from transformers import CLIPModel, CLIPTokenizer

    model = _loaded(CLIPModel, folder, device)
    processor, words = _image_processor(folder), _read(CLIPTokenizer, folder)
    scale, most = scale_of(model), model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def energy(x: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = processor(images=to_pil(x), return_tensors="pt").pixel_values.to(device)
        tokens = words(list(prompts), padding=True, truncation=True, max_length=most, return_tensors="pt").to(device)
        picture = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        text = model.text_projection(model.text_model(**tokens).pooler_output)
        return -scale * torch.cosine_similarity(picture.float(), text.float()).to(x.device)

    return energy


def image_reward(folder: str, device: str = "cpu") -> TextEnergy:
    """E = -ImageReward (arXiv 2304.05977), standardized as its authors do.

    folder: BLIP as transformers' `BlipForImageTextRetrieval`, its processor, and the five linear layers of the head,
    ``layers.N.weight`` and ``.bias``, in reward_head.safetensors.
    """
    from safetensors.torch import load_file
    from transformers import BertTokenizer, BlipForImageTextRetrieval

    model = _loaded(BlipForImageTextRetrieval, folder, device)
    processor, words = _image_processor(folder), _read(BertTokenizer, folder)
    if not (Path(folder) / HEAD).is_file():
        raise ValueError(f"{folder} has no {HEAD}, the head that makes a score of BLIP's features.")
    saved = {name.removeprefix("layers."): weight.float() for name, weight in load_file(Path(folder) / HEAD).items()}
    head = nn.Sequential(*_layers(saved)).to(device).eval()

    @torch.no_grad()
    def energy(x: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = processor(images=to_pil(x), return_tensors="pt").pixel_values.to(device)
        tokens = words(list(prompts), padding="max_length", truncation=True, max_length=BLIP_TOKENS, return_tensors="pt").to(
            device
        )
        picture = model.vision_model(pixel_values=pixels).last_hidden_state
        seen = torch.ones(picture.shape[:2], dtype=torch.long, device=device)
        text = model.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=picture,
            encoder_attention_mask=seen,
        )
        score = head(text.last_hidden_state[:, 0].float())[:, 0]
        return -((score - MEAN) / STD).to(x.device)

    return energy


def _layers(saved: dict[str, Tensor]) -> list[nn.Module]:
    """The head's modules in order; dropouts are left out.

    Errors: ValueError for weights that are no chain of linear layers.
    """
    numbers = sorted({int(name.partition(".")[0]) for name in saved if name.partition(".")[0].isdigit()})
    layers: list[nn.Module] = []
    for number in numbers:
        weight, bias = saved.get(f"{number}.weight"), saved.get(f"{number}.bias")
        if weight is None or bias is None or weight.ndim != 2 or len(bias) != len(weight):
            raise ValueError(f"layer {number} of {HEAD} is no linear layer with weight and bias.")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers:
        raise ValueError(f"{HEAD} holds no layers, which are named layers.0.weight and so on.")
    return layers


def written_text(text: str | None = None) -> TextEnergy:
    """E = 1 - (similarity of the text read in the picture with the one wanted), 0 where they are equal; capitals and spaces do
    not count. The text is read by `rapidocr-onnxruntime`, which has its networks with it.

    text: wanted in every picture; else metadata's "text", else what stands between double quotes in the prompt.

    Errors: ValueError where the package is missing; when called, for a prompt of which nothing is wanted.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR  # pyright: ignore[reportMissingImports] - optional
    except ImportError:
        raise ValueError("reading text needs a reader: pip install rapidocr-onnxruntime.") from None
    import numpy

    reader = RapidOCR()

    def energy(x: Tensor, prompts: Sequence[str] = (), metadata: Sequence[dict[str, Any]] = ()) -> Tensor:
        energies = []
        for number, picture in enumerate(to_pil(x)):
            told = metadata[number] if metadata else {}
            wanted = text or told.get("text") or _quoted(prompts[number] if prompts else "")
            found, _ = reader(numpy.array(picture))
            read = "".join(line[1] for line in found or [])
            energies.append(1 - SequenceMatcher(None, _plain(wanted), _plain(read), autojunk=False).ratio())
        return torch.tensor(energies, dtype=torch.float32, device=x.device)

    return energy


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _quoted(prompt: str) -> str:
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise ValueError(f'nothing is between double quotes in the prompt {prompt!r}, and no text is given: write a sign "open".')
    return parts[1]


def _loaded(kind: Any, folder: str, device: str) -> Any:
    """A frozen model from safetensors in a local folder. Errors: ValueError for a folder that holds none."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no {kind.__name__}: config.json is missing; give a local folder, nothing is downloaded."
        )
    try:
        model, info = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be read as a {kind.__name__}: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would make them up
        raise ValueError(f"{folder} is another model than a {kind.__name__}: its weights lack {missing[0]}.")
    return model.requires_grad_(False).eval().to(device)


def _image_processor(folder: str) -> Any:
    from transformers import AutoImageProcessor

    return _read(AutoImageProcessor, folder, use_fast=False)


def _read(kind: Any, folder: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # whatever a third party's reader makes of a folder
        raise ValueError(f"{folder} has no {kind.__name__} beside its weights: {str(error).strip().splitlines()[0]}") from error
