"""Rewards of pictures and prompts, on small stand-ins of the same classes: scores against the models' own calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.toys.text_pipelines import LENGTH, tokenizer
from tiltune.finetune.energies import text_rewards
from tiltune.finetune.energies.images import to_pil

PROMPTS = ["a red apple", "a pear"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    words, tokens = tokenizer(folder / "tokens")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1}
    text = {**sizes, **ends, "vocab_size": tokens, "max_position_embeddings": LENGTH}
    config: Any = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def own_cosine(folder: Path, pictures: torch.Tensor) -> torch.Tensor:
    """By the model's own call on both, whose logits are scaled cosines of every pair."""
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

    model: Any = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=to_pil(pictures), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image
    return logits.diagonal() / model.logit_scale.exp().item()


@pytest.mark.parametrize(("reward", "scale"), [("clip_score", 100.0), ("hps", 1.0), ("pick_score", None)])
def test_dual_encoders_score_as_the_model_does(clip: Path, pictures: torch.Tensor, reward: str, scale: float | None) -> None:
    from transformers import CLIPModel

    if scale is None:
        scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    energy = getattr(text_rewards, reward)(str(clip))
    found = energy(pictures, PROMPTS)
    torch.testing.assert_close(found, -scale * own_cosine(clip, pictures), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, energy(pictures, PROMPTS[::-1]))  # the prompt counts


def test_image_reward_scores_as_blip_and_its_head(tmp_path: Path, pictures: torch.Tensor) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor

    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "pear"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 12, "max_position_embeddings": 40, "encoder_hidden_size": 16}
    config: Any = BlipConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, image_text_hidden_size=8
    )
    model = BlipForImageTextRetrieval(config).eval()
    model.save_pretrained(tmp_path)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    layers = {0: (12, 16), 2: (4, 12), 4: (1, 4)}  # dropouts stand between
    head = {f"layers.{n}.weight": torch.randn(shape) for n, shape in layers.items()}
    head |= {f"layers.{n}.bias": torch.randn(shape[0]) for n, shape in layers.items()}
    with pytest.raises(ValueError, match=r"reward_head.safetensors"):
        text_rewards.image_reward(str(tmp_path))
    save_file(head, tmp_path / "reward_head.safetensors")
    energy = text_rewards.image_reward(str(tmp_path))
    found = energy(pictures, PROMPTS)
    # Its last hidden states by the model's own call, then the head as matrices.
    from transformers import AutoImageProcessor

    tokens = BertTokenizer.from_pretrained(tmp_path)(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=to_pil(pictures), return_tensors="pt").pixel_values
    with torch.no_grad():
        hidden = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels, use_itm_head=True
        ).question_embeds[:, 0]
    for n in layers:
        hidden = hidden @ head[f"layers.{n}.weight"].T + head[f"layers.{n}.bias"]
    torch.testing.assert_close(found, -(hidden[:, 0] - text_rewards.MEAN) / text_rewards.STD, rtol=1e-4, atol=1e-4)


def test_folders_that_hold_something_else(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        text_rewards.clip_score(str(tmp_path))
    with pytest.raises(ValueError, match=r"another model|cannot be read"):
        text_rewards.image_reward(str(clip))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="cannot be read"):
        text_rewards.pick_score(str(tmp_path))


def test_written_text_is_compared_with_the_one_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a reader that reads OPEN in two lines of a dark picture, and nothing in a bright one: not the real package."""

    class Reader:
        def __call__(self, picture: Any) -> tuple[Any, Any]:
            return ([[None, "OP", 1.0], [None, "EN", 1.0]], None) if picture.mean() < 128 else (None, None)

    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", SimpleNamespace(RapidOCR=Reader))
    energy = text_rewards.written_text()
    x = torch.stack([torch.full((3, 8, 8), -0.9), torch.full((3, 8, 8), 0.9)])
    assert energy(x, ['a sign "open"', 'a sign "open"']).tolist() == [0.0, 1.0]
    told = energy(x, ["a", "b"], [{"text": "o p e x"}, {"text": "o p e x"}])
    assert told.tolist() == pytest.approx([0.25, 1.0])
    assert text_rewards.written_text("Open")(x).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="double quotes"):
        energy(x, ["a sign", "a sign"])
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ValueError, match="pip install rapidocr-onnxruntime"):
        text_rewards.written_text()
