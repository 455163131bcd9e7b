"""One thread a test process, as the arrays are small and the machine is shared; a prior that many tests start from; and
``--check-shapes``, which checks the shapes and dtypes of every call (`shape_check`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check-shapes", action="store_true", help="check the shapes and dtypes of every call (slower)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--check-shapes"):
        from jaxtyping import install_import_hook

        from shape_check import CHECKED

        install_import_hook(CHECKED, "shape_check.shapes_only")


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DDPMPipeline with random weights, made and saved by plain diffusers; nobody writes into it."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("prior") / "pipeline"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(4, 1, 1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
        DDPMPipeline(unet, DDPMScheduler(clip_sample=False, variance_type="fixed_large")).save_pretrained(folder)
    return folder
