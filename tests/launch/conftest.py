"""What a stranger has: a pipeline saved by plain diffusers, and a file with functions that score samples."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tiltune.launch import cli

ENERGY = """
import torch

def ink(x):
    return x.flatten(1).mean(1)

def scaled(factor):
    return lambda x: factor * ink(x)

def stuck(x):
    raise RuntimeError("the scorer is down")

def taken_away(x):
    import signal
    signal.raise_signal(signal.SIGTERM)
    return ink(x)
"""


class Shown(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DDPMPipeline with random weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("prior") / "pipeline"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(4, 1, 1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
        DDPMPipeline(unet, DDPMScheduler(clip_sample=False, variance_type="fixed_large")).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with my_energy.py in it."""
    (tmp_path / "my_energy.py").write_text(ENERGY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiltune(capfd: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """The command line in this process: arguments → exit status and what was printed."""

    def run(*arguments: Any) -> Shown:
        capfd.readouterr()
        threads = torch.get_num_threads()
        try:
            status = cli.run([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
        except SystemExit as exit:  # how tyro ends for --help and for flags that it cannot read
            status = exit.code if isinstance(exit.code, int) else 1
        finally:
            torch.set_num_threads(threads)
        return Shown(status, *capfd.readouterr())

    return run


@pytest.fixture
def small(prior: Path) -> list[Any]:
    """Flags of a training that takes a moment."""
    sizes = ["--bank-size", 8, "--warm-start-updates", 2, "--warm-start-rows", 4, "--soft-value-updates", 1]
    slow = ["--learning-rate", 1e-5, "--warm-start-learning-rate", 1e-5]
    return ["--prior", prior, "--steps", 3, "--updates", 2, "--batch-size", 4, *sizes, *slow, "--device", "cpu"]
