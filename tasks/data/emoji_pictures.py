"""The pictures behind the emoji prior, and what they are called: read from the unpacked npm package `emoji-datasource-google`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZE, CELL = 32, 34  # pixels of a picture, and of its cell in the sheet, which has a border of one pixel

# What a prompt says of each subcategory, and of the category that it belongs to.
SUBCATEGORIES = {
    "face-smiling": ("a smiling face", "a smiley"),
    "face-affection": ("an affectionate face", "a smiley"),
    "face-tongue": ("a face with a tongue", "a smiley"),
    "face-hand": ("a face with a hand", "a smiley"),
    "face-neutral-skeptical": ("a neutral face", "a smiley"),
    "face-sleepy": ("a sleepy face", "a smiley"),
    "face-unwell": ("an unwell face", "a smiley"),
    "face-hat": ("a face with a hat", "a smiley"),
    "face-glasses": ("a face with glasses", "a smiley"),
    "face-concerned": ("a concerned face", "a smiley"),
    "face-negative": ("an angry face", "a smiley"),
    "face-costume": ("a costume", "a smiley"),
    "cat-face": ("a cat face", "a smiley"),
    "monkey-face": ("a monkey face", "a smiley"),
    "heart": ("a heart", "a smiley"),
    "emotion": ("an emotion", "a smiley"),
    "animal-mammal": ("a mammal", "an animal"),
    "animal-bird": ("a bird", "an animal"),
    "animal-amphibian": ("an amphibian", "an animal"),
    "animal-reptile": ("a reptile", "an animal"),
    "animal-marine": ("a sea animal", "an animal"),
    "animal-bug": ("a bug", "an animal"),
    "plant-flower": ("a flower", "a plant"),
    "plant-other": ("a leaf", "a plant"),
    "food-fruit": ("a fruit", "a food"),
    "food-vegetable": ("a vegetable", "a food"),
    "food-prepared": ("a meal", "a food"),
    "food-asian": ("an asian dish", "a food"),
    "food-sweet": ("a sweet", "a food"),
    "drink": ("a drink", "a food"),
    "dishware": ("a dish", "a food"),
}
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")


@dataclass(frozen=True)
class Pictures:
    """images [N, 3, 32, 32] in [-1, 1] on white; for each its name, its subcategory's prompt and its category's prompt."""

    images: Tensor
    names: tuple[str, ...]
    subcategories: tuple[str, ...]
    categories: tuple[str, ...]

    def prompts(self, number: int) -> tuple[str, str, str]:
        """The three prompts of a picture, from the narrowest on."""
        return self.names[number], self.subcategories[number], self.categories[number]

    def words(self) -> list[str]:
        """Every word of every prompt, once, sorted."""
        texts = [*self.names, *self.subcategories, *self.categories]
        return sorted({word for text in texts for word in text.split()})


def read_pictures(package: Path) -> Pictures:
    """The smileys, animals, plants and foods of the unpacked package.

    Errors: ValueError for a folder that is not the package.
    """
    import numpy
    from PIL import Image

    sheet, table = package / "img" / "google" / "sheets" / "32.png", package / "emoji.json"
    missing = [str(path) for path in (sheet, table) if not path.is_file()]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing; unpack `npm pack emoji-datasource-google@16.0.0`, and give its folder package/."
        )
    rows: list[dict[str, Any]] = [
        row
        for row in json.loads(table.read_text(encoding="utf-8"))
        if row["category"] in CATEGORIES and row["subcategory"] in SUBCATEGORIES and row["has_img_google"]
    ]
    rows.sort(key=lambda row: row["sort_order"])
    pixels = Image.open(sheet).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    whole = torch.from_numpy(numpy.array(white)).permute(2, 0, 1).float() / 127.5 - 1
    corners = [(row["sheet_y"] * CELL + 1, row["sheet_x"] * CELL + 1) for row in rows]
    images = torch.stack([whole[:, top : top + SIZE, left : left + SIZE] for top, left in corners])
    return Pictures(
        images,
        tuple(_name(row) for row in rows),
        tuple(SUBCATEGORIES[row["subcategory"]][0] for row in rows),
        tuple(SUBCATEGORIES[row["subcategory"]][1] for row in rows),
    )


def _name(row: dict[str, Any]) -> str:
    """The name in small letters, without what a tokenizer of letters would not know."""
    kept = "".join(letter if letter.isascii() and letter.isalpha() else " " for letter in row["name"].lower())
    return " ".join(kept.split())
