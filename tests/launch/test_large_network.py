"""A network of a hundred million parameters trains on a CPU within 8 GB."""

import json
import subprocess
import sys

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

LIMIT_GB = 8.0
MEASURE = """
import resource, sys
from tiltune.launch import cli
status = cli.run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
raise SystemExit(status)
"""


@pytest.mark.slow
def test_two_updates_of_a_hundred_million_parameters_at_fifty_steps_fit_in_memory(tmp_path):
    network = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), layers_per_block=2
    )
    count = sum(weight.numel() for weight in network.parameters())
    assert 95e6 < count < 130e6
    DDPMPipeline(network, DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "prior")
    del network
    (tmp_path / "dark.py").write_text("def dark(x):\n    return 10 * x.flatten(1).mean(1)\n")
    arguments = ["train", "--prior", tmp_path / "prior", "--energy", f"{tmp_path / 'dark.py'}:dark", "--steps", 50]
    arguments += ["--warm-start", "none", "--behavior", "on_policy", "1.0", "--soft-value-updates", 0, "--forward-rows", 0]
    arguments += ["--updates", 2, "--batch-size", 2, "--objective", "log_variance", "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["updates"] == 2
    peak = float(done.stdout.split("peak")[-1])
    print(f"{count / 1e6:.0f}M parameters: peak {peak:.2f} GB")
    assert peak < LIMIT_GB
