"""Hints: each names a flag that this chain has, and lowers what it says it lowers; a chain without fault gets none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from tiltune.samplers.loading.hints import start_hint, variance_hint, widest_variance
from tiltune.samplers.loading.pretrained import load_prior
from tiltune.samplers.schedulers.dispatch import chain_from_scheduler

SHAPE = (3, 16, 16)
DEFAULTS: dict[str, Any] = {"eta": 1.0, "noise": "memoryless", "noise_level": 0.7}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def hint(scheduler: Any, steps: int, **settings: Any) -> str | None:
    settings = DEFAULTS | settings
    return start_hint(chain_from_scheduler(scheduler, steps, **settings), scheduler, SHAPE, **settings)


def share(scheduler: Any, steps: int, **settings: Any) -> float:
    return chain_from_scheduler(scheduler, steps, **DEFAULTS | settings).remembered_share(widest_variance(SHAPE))


@pytest.mark.parametrize(
    ("scheduler", "steps", "settings", "words", "mended"),
    [
        (DDIMScheduler(), 50, {"eta": 0.2}, "--eta 1", {"eta": 1.0}),
        (FlowMatchEulerDiscreteScheduler(), 20, {"noise": "flow_grpo"}, "--noise memoryless", {"noise": "memoryless"}),
    ],
)
def test_the_flag_that_adds_noise_is_named_with_what_it_reaches(
    scheduler: Any, steps: int, settings: Any, words: str, mended: Any
) -> None:
    said = hint(scheduler, steps, **settings)
    assert said is not None and said.startswith(
        f"hint: the start is remembered (share {share(scheduler, steps, **settings):.2g})"
    )
    after = share(scheduler, steps, **settings | mended)
    assert after < 0.1 and f"{words} lowers it to {after:.2g}" in said
    assert "--exact" not in said and "trailing" not in said
    assert hint(scheduler, steps, **settings | mended) is None


def test_more_steps_and_trailing_timesteps_are_computed() -> None:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    said = hint(scheduler, 20)
    assert said is not None and "--eta" not in said and "--noise" not in said
    for steps in map(int, re.findall(r"--steps (\d+)", said)):
        assert f"--steps {steps} lowers it to {share(scheduler, steps):.2g}" in said
    trailing = DDPMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    assert f"of a copy of this prior lowers it to {share(trailing, 20):.2g}" in said
    assert hint(trailing, 20) is None


def test_where_nothing_helps_enough_reweighting_is_what_is_left() -> None:
    for scheduler in (DDIMScheduler(**STABLE, clip_sample=False), EulerAncestralDiscreteScheduler(**STABLE)):
        said = hint(scheduler, 50)
        assert said is not None and said.endswith("tiltune sample --exact removes by reweighting")
        assert "--eta" not in said and "--steps" not in said and "trailing" not in said


def test_spacings_along_which_nothing_can_be_noised_back_are_not_proposed() -> None:
    """DDIM at 30 of 1000 steps: trailing forgets the start, and has no bridge."""
    said = hint(DDIMScheduler(beta_schedule="squaredcos_cap_v2"), 30)
    assert said is not None and "trailing" not in said
    said = hint(DDIMScheduler(beta_schedule="squaredcos_cap_v2"), 20)
    assert said is not None and "trailing" in said


def test_a_forgotten_start_and_a_fixed_one_get_no_hint() -> None:
    assert hint(DDPMScheduler(), 50) is None
    assert hint(FlowMatchEulerDiscreteScheduler(), 20) is None


@pytest.mark.parametrize(
    ("variance", "steps", "told"), [("fixed_small", 20, True), ("fixed_small", 100, False), ("fixed_large", 20, False)]
)
def test_the_small_variance_of_a_short_chain_is_told(variance: str, steps: int, told: bool) -> None:
    said = variance_hint(chain_from_scheduler(DDPMScheduler(variance_type=variance), steps))
    assert (said is not None) == told
    if said is not None:
        assert f"K = {steps}" in said and "--variance fixed_large" in said


def test_the_loader_adds_them_below_its_decisions_unless_the_variance_was_chosen(tmp_path: Path) -> None:
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path)
    hints = [line for line in load_prior(tmp_path, 5).decisions[3:] if line.startswith("hint: ")]
    assert len(hints) == 2 and "--variance fixed_large" in hints[0] and "the start is remembered" in hints[1]
    assert len(load_prior(tmp_path, 5, variance="fixed_small").decisions) == 4  # it was asked for
    assert len(load_prior(tmp_path, 200, variance="fixed_large").decisions) == 3
