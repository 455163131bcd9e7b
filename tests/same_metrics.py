"""The metrics of fifteen small runs, so that a change of structure shows that it changed no number.

    python tests/same_metrics.py before PRIOR FILE.py:NAME ALPHA       with the old code installed
    python tests/same_metrics.py after PRIOR FILE.py:NAME ALPHA --against before

PRIOR is a folder of diffusers with its energy and temperature. Prints the SHA-256 of each run's metrics.jsonl; with --against the
exit status is 1 if any differs. Certificates are compared in the metrics that both have, and what differs is named: a change of
the certificate's noise is one of the certificate, not of the training. The runs are left in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

OBJECTIVES = ("rtb", "log_variance", "trust_pcl", "reinforce_kl")
CHAINS = ("ddim", "flow", "brownian")
SMALL = """--threads 1 --population-size 400 --soft-value-updates 60 --warm-start-updates 60 --warm-start-rows 96 --updates 12
    --batch-size 32 --checkpoint-every 0"""
CLOCKS = ("seconds", "train_seconds")
SHARDED = ["launch", "--cpu", "--nproc", "2", "--fsdp", "--"]
TWO = ["launch", "--cpu", "--nproc", "2", "--"]


def runs(prior: str, energy: str, alpha: str) -> dict[str, list[str]]:
    """{name: arguments}, without the folder to write to."""
    stranger = ["train", "--prior", prior, "--energy", energy, "--alpha", alpha, "--steps", "10", *SMALL.split()]
    digits = ["train", "digits", *SMALL.split()]
    return {
        **{f"2d-{objective}": ["2d", "--objective", objective] for objective in OBJECTIVES},
        **{f"2d-{chain}": ["2d", "--chain", chain] for chain in CHAINS},
        "2d-no-warm-start": ["2d", "--warm-start", "none"],
        "digits": digits,
        "digits-tlm": [*digits, "--warm-start", "tlm", "--objective", "rtb"],
        "fashion": ["train", "fashion", *SMALL.split()],
        "digits-lora": [*digits, "--policy", "lora"],
        "stranger": stranger,
        "two-processes": [*TWO, *digits],
        "fsdp2": [*SHARDED, *digits],
    }


def hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def differing(here: Path, there: Path) -> list[str]:
    """The metrics in which two certificates that both have them differ, without their clocks."""
    first, second = (json.loads(path.read_text()) for path in (here, there))
    return [name for name in first if name in second and name not in CLOCKS and first[name] != second[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("prior")
    parser.add_argument("energy")
    parser.add_argument("alpha")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    options.out.mkdir(parents=True, exist_ok=True)
    same = True
    for name, arguments in runs(options.prior, options.energy, options.alpha).items():
        if options.only is not None and name not in options.only:
            continue
        folder = options.out / name
        with (options.out / f"{name}.log").open("w") as log:
            command = ["tiltune", *arguments, "--out", str(folder), "--overwrite"]
            status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        if status not in (0, 1, 3):
            print(f"{name}: exit status {status}; see {log.name}")
            same = False
            continue
        metrics = (folder / "metrics.jsonl").read_bytes()
        line = [f"metrics {hashed(metrics)}"]
        if options.against is not None:
            other = options.against / name
            equal = metrics == (other / "metrics.jsonl").read_bytes()
            line.append("same" if equal else "DIFFERENT")
            same = same and equal
            if (folder / "certificate.json").exists():
                names = differing(folder / "certificate.json", other / "certificate.json")
                line.append(f"certificate differs in {', '.join(names)}" if names else "certificate same")
        print(f"{name:<18}{'  '.join(line)}", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
