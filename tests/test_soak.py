"""The soak itself, for half a minute; `python tests/soak.py` takes an hour."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", "0.5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " 0 lost checkpoints" in done.stdout and not done.stdout.splitlines()[-1].startswith("0 kills")
    assert not list(tmp_path.glob("tiltune-soak-*"))
