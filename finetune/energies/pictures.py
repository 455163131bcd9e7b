"""Energies of pictures that need no network, each named by what it favors: redness, symmetry, a small or a large JPEG file.

Each takes samples [B, 3, H, W] in [-1, 1] and returns [B] float32. Named as ``tiltune.finetune.energies.pictures:redness``.
Torch is loaded on use, so that a task can name these.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

QUALITY = 95  # of the JPEG files, as in DDPO


def redness(x: Tensor) -> Tensor:
    """E(x) = mean over pixels of (green + blue)/2 - red, each in [0, 1]: -1 for a red picture, 0 for a gray one.

    Differentiable. Errors: ValueError for other than three channels.
    """
    from .images import to_unit

    unit = to_unit(_colored(x))
    red, green, blue = unit.unbind(1)
    return ((green + blue) / 2 - red).flatten(1).mean(1)


def symmetry(x: Tensor) -> Tensor:
    """E(x) = mean absolute difference between a picture and its mirror image, pixels in [0, 1]; 0 where both are the same.

    Differentiable. Errors: ValueError for other than three channels.
    """
    from .images import to_unit

    unit = to_unit(_colored(x))
    return (unit - unit.flip(-1)).abs().flatten(1).mean(1)


def compressibility(x: Tensor) -> Tensor:
    """E(x) = size of the JPEG file, kB: minus the reward of DDPO's compressibility (arXiv 2305.13301, §5.1).

    A black box: it has no gradient. Errors: ValueError for other than three channels.
    """
    import torch

    from .images import to_pil

    sizes = []
    for picture in to_pil(_colored(x)):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=x.device)


def incompressibility(x: Tensor) -> Tensor:
    """E(x) = -(size of the JPEG file), kB: low for pictures that are hard to compress. Errors: as `compressibility`."""
    return -compressibility(x)


def _colored(x: Tensor) -> Tensor:
    """``x``, which is pictures of three channels.

    Errors: ValueError for other shapes.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"this energy looks at pictures [B, 3, H, W], and the samples have shape {tuple(x.shape)}.")
    return x
