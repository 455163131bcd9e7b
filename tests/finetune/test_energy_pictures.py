"""Energies of pictures against values that are known, and against PIL by itself."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from tiltune.finetune.energies.images import to_uint8
from tiltune.finetune.energies.pictures import compressibility, incompressibility, redness, symmetry


def plain(*color: float) -> torch.Tensor:
    """A picture [1, 3, 8, 8] of one color in [0, 1]."""
    return 2 * torch.tensor(color, dtype=torch.float32).reshape(1, 3, 1, 1).expand(1, 3, 8, 8) - 1


def test_redness_of_plain_colors() -> None:
    colors = torch.cat([plain(1, 0, 0), plain(0.3, 0.3, 0.3), plain(0, 1, 0), plain(1, 1, 0), plain(5, -3, -3)])
    assert redness(colors).tolist() == pytest.approx([-1.0, 0.0, 0.5, -0.5, -1.0], abs=1e-6)  # the last is clamped


def test_symmetry_is_the_distance_to_the_mirror_image() -> None:
    x = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mirrored = torch.cat([x[..., :3], x[..., :3].flip(-1)], -1)
    assert symmetry(mirrored).abs().max() == 0
    half = plain(0, 0, 0).clone()
    half[..., 4:] = 1.0
    assert symmetry(half).item() == pytest.approx(1.0)


def test_compressibility_is_the_size_of_pils_file() -> None:
    x = torch.cat([plain(0.2, 0.4, 0.9), torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    sizes = []
    for pixels in to_uint8(x):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert compressibility(x).tolist() == pytest.approx(sizes) and sizes[1] > sizes[0]
    assert torch.equal(incompressibility(x), -compressibility(x))


@pytest.mark.parametrize("energy", [redness, symmetry])
def test_gradients_are_those_of_finite_differences(energy: object) -> None:
    x = (torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("energy", [redness, symmetry, compressibility, incompressibility])
def test_what_is_no_picture_is_refused(energy: object) -> None:
    for shape in ((2, 1, 8, 8), (2, 3, 8)):
        with pytest.raises(ValueError, match=r"looks at pictures \[B, 3, H, W\]"):
            energy(torch.zeros(shape))  # pyright: ignore[reportCallIssue]
