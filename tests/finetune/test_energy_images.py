"""Samples as images, bit for bit as diffusers makes them, and rewards in the form of DDPO and Flow-GRPO."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.pil_utils import pt_to_pil
from PIL import Image
from torch import Tensor

from tiltune.finetune.energies.energy import EnergyMeter, from_reward
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.energies.images import to_pil, to_uint8, to_unit


def samples(channels: int = 3, count: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Model space, beyond its bounds too, with every value at which the rounding has a tie."""
    x = 1.3 * torch.randn(count, channels, 12, 16, generator=torch.Generator().manual_seed(channels))
    x[0].flatten()[:192] = (torch.arange(192) + 0.5) / 127.5 - 1
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_conversions_are_those_of_diffusers(channels: int, dtype: torch.dtype) -> None:
    x = samples(channels, dtype=dtype)
    processor = VaeImageProcessor()
    assert torch.equal(to_unit(x), processor.postprocess(x, output_type="pt"))
    array = processor.postprocess(x, output_type="np")
    assert isinstance(array, np.ndarray)
    expected = (array * 255).round().astype("uint8")
    pixels = to_uint8(x)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (5, 12, 16, channels)
    assert np.array_equal(pixels, expected)
    for mine, theirs, old in zip(to_pil(x), processor.postprocess(x, output_type="pil"), pt_to_pil(x), strict=True):
        assert mine.mode == theirs.mode == old.mode == ("L" if channels == 1 else "RGB")
        assert mine.size == (16, 12)
        assert mine.tobytes() == theirs.tobytes() == old.tobytes()
    # The control: truncating, as .to(torch.uint8) alone does, is another conversion.
    truncated = (to_unit(x).float() * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert not np.array_equal(pixels, truncated)


def test_to_unit_is_differentiable_inside_the_bounds_and_takes_any_shape() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0], requires_grad=True)
    unit = to_unit(x)
    assert unit.tolist() == [0, 0, 0.5, 0.75, 1]
    unit.sum().backward()
    assert x.grad is not None
    assert x.grad[[0, 2, 3, 4]].tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("convert", "x", "message"),
    [
        (to_unit, torch.zeros(2, 3, dtype=torch.uint8), "uint8 tensor is not in model space"),
        (to_uint8, torch.zeros(2, 3), r"shape \[B, C, H, W\], and these samples \(2, 3\)"),
        (to_uint8, torch.full((2, 1, 2, 2), torch.nan), "2 of 2 samples hold NaN"),
        (to_pil, torch.zeros(2, 4, 2, 2), "1 or 3 channels, and these samples have 4; decode"),
    ],
)
def test_what_is_no_image_is_refused(convert: Any, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(x)


def jpeg_kilobytes(images: Any, prompts: Any, metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """What DDPO's incompressibility reward measures: the size of each picture as a JPEG of quality 95."""
    if isinstance(images, Tensor):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes), {}


@pytest.mark.parametrize("images", ["unit", "uint8", "pil"])
def test_a_reward_of_ddpo(images: Any) -> None:
    """Flat pictures are small files and noise is large ones; E = -R prefers the noise."""
    x = samples(count=4)
    x[0], x[1] = 0.0, torch.linspace(-1, 1, 16)
    energy = EnergyMeter(from_reward(jpeg_kilobytes, images=images))(x)
    expected = []
    for picture in pt_to_pil(x):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=95)
        expected.append(-len(buffer.getvalue()) / 1000)
    torch.testing.assert_close(energy, torch.tensor(expected))
    assert energy.argmax() == 0
    assert energy[2:].max() < energy[:2].min()
    # The control: with the sign of the reward, the flat picture would be preferred.
    flipped = EnergyMeter(lambda x: torch.tensor(jpeg_kilobytes(to_unit(x), [], [])[0]))(x)
    assert flipped.argmin() == 0


@pytest.mark.parametrize(
    ("images", "kind", "shape"),
    [("raw", Tensor, (5, 3, 12, 16)), ("unit", Tensor, (5, 3, 12, 16)), ("uint8", np.ndarray, (5, 12, 16, 3))],
)
def test_the_reward_is_given_what_was_chosen(images: Any, kind: type, shape: tuple[int, ...]) -> None:
    seen: list[Any] = []

    def reward(images: Any, prompts: Any, metadata: Any) -> tuple[list[float], dict[str, Any]]:
        seen.append((images, prompts, metadata))
        return [1.0] * 5, {}

    x = samples()
    assert EnergyMeter(from_reward(reward, images=images))(x).tolist() == [-1.0] * 5
    given, prompts, metadata = seen[0]
    assert isinstance(given, kind)
    assert tuple(given.shape) == shape
    if images == "raw":
        assert torch.equal(given, x)
    assert (prompts, metadata) == ([""] * 5, [{}] * 5)
    assert metadata[0] is not metadata[1]


def test_prompts_and_metadata_are_fixed_or_come_with_the_samples() -> None:
    seen: list[Any] = []

    def reward(images: Any, prompts: Any, metadata: Any) -> tuple[Tensor, None]:
        seen.append((prompts, metadata))
        for one in metadata:
            one["touched"] = True  # must reach no other call
        return torch.arange(3.0), None

    x, context = samples(count=3), {"prompts": ("a", "b", "c"), "metadata": [{"n": 1}, {"n": 2}, {"n": 3}]}
    for fixed in ({}, {"prompts": "a cat", "metadata": {"n": 0}}):
        for _ in range(2):
            EnergyMeter(from_reward(reward, images="unit", **fixed))(x, **context, class_labels=torch.arange(3))
    touched = {"touched": True}
    assert seen[0] == seen[1] == (["a", "b", "c"], [{"n": 1} | touched, {"n": 2} | touched, {"n": 3} | touched])
    assert seen[2] == seen[3] == (["a cat"] * 3, [{"n": 0} | touched] * 3)
    assert context["metadata"] == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 2.0],
        [1, 2],
        (1.0, 2.0),
        np.array([1.0, 2.0]),
        np.array([1, 2]),
        np.array([2.0, 1.0])[::-1],
        torch.tensor([1, 2]),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        [torch.tensor(1.0), torch.tensor(2.0)],
        [np.float64(1), np.float32(2)],
    ],
)
def test_scores_may_be_any_numbers(scores: Any) -> None:
    energy = EnergyMeter(from_reward(lambda images, prompts, metadata: (scores, {}), images="unit"))(samples(count=2))
    assert energy.tolist() == [-1.0, -2.0]


def test_the_scores_of_flow_grpo_come_by_name() -> None:
    def multi(images: Any, prompts: Any, metadata: Any, ref_images: Any = None, only_strict: bool = True) -> Any:
        return {"ocr": [9.0, 9.0], "avg": [0.5, 0.25]}, {}

    assert EnergyMeter(from_reward(multi, images="unit", score="avg"))(samples(count=2)).tolist() == [-0.5, -0.25]
    with pytest.raises(EnergyError, match="dict of ocr, avg; say which with score="):
        EnergyMeter(from_reward(multi, images="unit"))(samples(count=2))
    with pytest.raises(EnergyError, match="dict of ocr, avg; 'clip' is none of them"):
        EnergyMeter(from_reward(multi, images="unit", score="clip"))(samples(count=2))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(2), r"raised ValueError: the reward returned ndarray, not a pair \(scores, info\)"),
        ((np.zeros(2), {}, 3), "returned tuple, not a pair"),
        ((["good", "bad"], {}), "scores are not 2 numbers"),
        (([[1.0], [2.0, 3.0]], {}), "scores are not 2 numbers"),
        ((np.zeros((2, 1)), {}), r"returned shape \(2, 1\) for 2 samples"),
        ((0.5, {}), r"returned shape \(\) for 2 samples"),
        ((np.zeros(3), {}), r"returned shape \(3,\) for 2 samples"),
        (
            (torch.zeros(2, requires_grad=True), {}),
            r"from_reward\(lambda on line \d+ of test_energy_images.py\) returned .* requires grad",
        ),
    ],
)
def test_rewards_that_return_something_else_are_refused(returned: Any, message: str) -> None:
    with pytest.raises(EnergyError, match=message):
        EnergyMeter(from_reward(lambda images, prompts, metadata: returned, images="raw"))(samples(count=2))


def test_the_form_of_a_reward_is_said_not_guessed() -> None:
    with pytest.raises(ValueError, match="images is 'numpy'; choose one of raw, unit, uint8, pil"):
        from_reward(jpeg_kilobytes, images="numpy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompts, metadata and score belong to.*images= one of raw"):
        from_reward(jpeg_kilobytes, prompts="a cat")
    with pytest.raises(EnergyError, match=r"needs prompts and metadata.*images="):
        EnergyMeter(from_reward(jpeg_kilobytes))(samples())
    with pytest.raises(EnergyError, match="score='avg' was given, but the reward's scores are no dict"):
        EnergyMeter(from_reward(jpeg_kilobytes, images="unit", score="avg"))(samples())
