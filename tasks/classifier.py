"""A small convolutional classifier: the energy of the image tasks, and the judge that counts what a policy drew."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class SmallClassifier(nn.Module):
    """Images [B, channels, size, size] in [-1, 1], on any device → logits [B, classes].

    One 3 x 3 convolution at full size, two that halve it, one linear layer; smooth activations, so that an energy made of it
    has a gradient. size: a multiple of 4. width: channels of the first convolution; the others have twice as many.

    Errors: ValueError for a size that cannot be halved twice.
    """

    def __init__(self, size: int, width: int = 16, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        if size < 4 or size % 4:
            raise ValueError(f"a classifier of images of {size} x {size} pixels cannot halve them twice; use a multiple of 4.")
        self.config = {"size": size, "width": width, "classes": classes, "channels": channels}
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.to(next(self.parameters())))

    def save(self, folder: str | Path) -> None:
        """config.json and model.safetensors in float16, about two bytes a parameter."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> SmallClassifier:
        """The saved classifier in float32, frozen, in evaluation mode.

        Errors: ValueError where the folder lacks one of the two files.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} holds no classifier: {' and '.join(missing)} missing; `SmallClassifier.save` writes both."
            )
        classifier = cls(**json.loads((folder / CONFIG).read_text()))
        classifier.load_state_dict(load_file(folder / WEIGHTS))
        return classifier.float().requires_grad_(False).eval()


def predicted(classifier: nn.Module, images: Tensor, batch: int = 4096) -> Tensor:
    """The most probable class of each image [N]."""
    with torch.no_grad():
        return torch.cat([classifier(part).argmax(1) for part in images.split(batch)])


class ClassEnergy:
    """E(x) = -log p(class in ``wanted`` | x), nats, by a classifier (`from_classifier`)."""

    def __init__(self, classifier: nn.Module, wanted: tuple[int, ...]) -> None:
        from ..finetune.energies.likelihoods import from_classifier

        self.wanted = wanted
        self._energy = from_classifier(classifier, wanted)

    def __call__(self, x: Tensor) -> Tensor:
        return self._energy(x)
