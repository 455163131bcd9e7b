"""The command line: one module a verb, imported only when it is asked for, so that help is instant."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from importlib import import_module

from .._version import __version__
from ..finetune.distributed.signals import Preempted, ProcessError
from ..finetune.energies.error import EnergyError
from .cluster.torchrun import UNSAVED, end_at_once

VERBS = {
    "train": ("train", "fine-tune a shipped task, or any diffusers prior toward any energy"),
    "evaluate": ("evaluate", "judge a run by fresh rollouts of both sides: its certificate"),
    "sample": ("sample", "draw from a run's policy; --exact for samples of the tilted prior itself"),
    "export": ("export", "write a run's policy as a diffusers pipeline or peft adapters"),
    "audit": ("audit", "judge a LoRA or network that another toolkit trained, by the tilt it is closest to"),
    "checkpoint": ("checkpoint", "list or verify what a run has saved to go on from"),
    "launch": ("launch", "train in several processes, here or on a cluster: tiltune launch -- train ..."),
    "doctor": ("doctor", "say what is installed, whether processes reach each other, and what is wrong"),
    "tasks": ("tasks", "list the shipped tasks"),
    "2d": ("two_d", "fine-tune the shipped 2D prior onto a known target and certify the result"),
    "study": ("study", "answer a question by many trainings: tables, a figure, an answer in words"),
    "bench": ("bench", "measure update time over its floor, memory, and the log-ratio's error"),
    "completion": ("completion", "print a completion script: source <(tiltune completion bash)"),
}
# EX_SOFTWARE of sysexits.h. Python's own 1 would read as a certificate that fails.
UNEXPECTED = 70
HELP = f"""tiltune {__version__}: fine-tune diffusion samplers toward energies, and prove how close they came.

usage: tiltune VERB [options]          (tiltune VERB --help says more)

{chr(10).join(f"  {name:<11} {text}" for name, (_, text) in VERBS.items())}

example: tiltune train digits --out my-run && tiltune evaluate my-run
"""


def main() -> None:
    """Entry point of the console script."""
    status = run(sys.argv[1:])
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun without `worker.py`, as in `torchrun -m tiltune doctor`
        end_at_once(status)
    raise SystemExit(status)


def run(arguments: list[str]) -> int:
    """Run a verb; returns the exit status: the verb's own, 1 for a training that broke down, 2 for bad input, `UNEXPECTED` for
    any other error, 130 for Ctrl-C, 141 for a reader that went away."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]}" if near else f"choose one of {', '.join(VERBS)}"
        print(f"tiltune: unknown verb {verb!r}; {hint}.", file=sys.stderr)
        return 2
    try:
        return import_module(f".verbs.{VERBS[verb][0]}", __package__).main(arguments[1:])
    except Preempted as signal:
        print(f"{signal}: nothing of this was saved; run the same command again.", file=sys.stderr)
        return UNSAVED
    except KeyboardInterrupt:
        print(f"interrupted: what {verb} had not written yet is lost", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader had enough, as in `tiltune tasks | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports it; 1 is a verdict
    except (ValueError, OSError, FloatingPointError, ProcessError) as error:
        if isinstance(error, EnergyError) and error.trace:
            print(error.trace, file=sys.stderr)
        print(f"tiltune {verb}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | ProcessError) else 2
    except Exception as error:  # out of memory, or a bug of ours
        traceback.print_exc()
        print(f"tiltune {verb}: unexpected {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return UNEXPECTED
