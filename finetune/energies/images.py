"""Samples in model space, [-1, 1], as the images that reward models take, and the calls of such rewards.

The arithmetic of the conversions is diffusers' own, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

ImageForm = Literal["raw", "unit", "uint8", "pil"]
IMAGE_FORMS: tuple[str, ...] = get_args(ImageForm)


def to_unit(x: Tensor) -> Tensor:
    """Model space [-1, 1] → [0, 1], clamped: x/2 + ½. Any shape, floating; differentiable inside the bounds.

    Errors: ValueError for integers, which are not in model space.
    """
    if not x.is_floating_point():
        raise ValueError(f"a {x.dtype} tensor is not in model space; pass floating-point samples in [-1, 1].")
    return (x * 0.5 + 0.5).clamp(0, 1)


def to_uint8(x: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] → uint8 [B, H, W, C] in 0..255, rounded half to even.

    Errors: ValueError for other ranks, integers, or NaN, which no pixel can hold.
    """
    if x.ndim != 4:
        raise ValueError(f"images have shape [B, C, H, W], and these samples {tuple(x.shape)}.")
    unit = to_unit(x.detach()).float()
    bad = unit.isnan().flatten(1).any(1)
    if bad.any():
        raise ValueError(f"{int(bad.sum())} of {len(x)} samples hold NaN, which no pixel can; the sampler has diverged.")
    return (unit.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)


def to_pil(x: Tensor) -> list[Image]:
    """[B, C, H, W] in [-1, 1] → B PIL images, mode "L" for one channel and "RGB" for three.

    Errors: ValueError for other numbers of channels, and those of `to_uint8`.
    """
    from PIL import Image

    pixels = to_uint8(x)
    if pixels.shape[-1] not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, and these samples have {pixels.shape[-1]}; decode latents first.")
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]


def image_reward(
    reward: Callable[..., Any], images: ImageForm, prompts: str | None, metadata: Any, score: str | None
) -> Callable[..., Tensor]:
    """A reward ``(images, prompts, metadata) -> (scores, info)`` as x [B, C, H, W] → R(x) [B] float32; see `from_reward`.

    Errors: ValueError for an unknown ``images``; when called, for what is not such a pair of B numbers and anything.
    """
    if images not in IMAGE_FORMS:
        raise ValueError(f"images is {images!r}; choose one of {', '.join(IMAGE_FORMS)}.")
    convert = {"raw": torch.clone, "unit": to_unit, "uint8": to_uint8, "pil": to_pil}[images]
    fixed_prompts, fixed_metadata = prompts, metadata

    def scores(x: Tensor, *, prompts: Any = None, metadata: Any = None) -> Tensor:
        each_prompt = _each(len(x), fixed_prompts, prompts, "")
        each_metadata = _each(len(x), fixed_metadata, metadata, {})
        return _scores(reward(convert(x), each_prompt, each_metadata), score, x)

    return scores


def _each(count: int, fixed: Any, given: Any, default: Any) -> list[Any]:
    """One value a sample: the fixed one, else those of the context, else the default; copies of what is repeated."""
    if fixed is None and given is not None:
        return list(given)
    return [copy.deepcopy(default if fixed is None else fixed) for _ in range(count)]


def _scores(returned: Any, score: str | None, x: Tensor) -> Tensor:
    """The scores of a pair (scores, info), float32 on the device of ``x``."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ValueError(f"the reward returned {type(returned).__name__}, not a pair (scores, info)")
    scores = returned[0]
    if isinstance(scores, Mapping):
        if score not in scores:
            wanted = "say which with score=" if score is None else f"{score!r} is none of them"
            raise ValueError(f"the reward's scores are a dict of {', '.join(map(str, scores))}; {wanted}")
        scores = scores[score]
    elif score is not None:
        raise ValueError(f"score={score!r} was given, but the reward's scores are no dict")
    if not isinstance(scores, Tensor):
        try:
            scores = torch.from_numpy(np.array(scores, dtype=np.float32))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the reward's scores are not {len(x)} numbers") from error
    return scores.to(device=x.device, dtype=torch.float32)
