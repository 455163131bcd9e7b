"""`tiltune export`: a run's policy as a model that plain diffusers and peft load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...finetune.runs.folder import holds_anything
from .. import flags
from .tasks import open_with_task

DESCRIPTION = """Write a run's policy in a form that other libraries load: `pipeline`, the prior's diffusers pipeline with the
policy as its denoiser; `lora`, the adapters alone as peft saves them; `merged`, the pipeline with the adapters added to its
weights. A deployed pipeline samples with its own scheduler: `tiltune evaluate` measures what that changes. Exit status: 0
written, 2 bad input, 70 an unexpected error, after its traceback.

example: tiltune export my-run --format pipeline --out my-pipeline
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune export` takes."""

    run: flags.RunFolder
    """Folder of the run."""
    out: Path
    """Folder for the export; refused if it holds anything."""
    format: Literal["pipeline", "lora", "merged"] = "pipeline"


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    options = flags.parse(Options, argv, "tiltune export", DESCRIPTION)
    if holds_anything(options.out):
        raise ValueError(f"{options.out} is not an empty folder; nothing was touched. Name another one with --out.")
    run = open_with_task(options.run)
    from ...finetune.runs.card import model_card
    from ...finetune.runs.export import export_policy

    usage = export_policy(run.policy, options.format, options.out, model_card(run))
    print(f"written to {options.out}; it loads with\n\n{usage}")
    return 0
