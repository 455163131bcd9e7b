"""The command line: one module a verb, imported only when it is asked for, so that help is instant."""

from __future__ import annotations

import sys
from importlib import import_module

from .._version import __version__

VERBS = {
    "2d": ("two_d", "fine-tune the shipped 2D prior onto a known target and certify the result"),
    "bench": ("bench", "measure update time over its floor, memory, and the log-ratio's error"),
}
HELP = f"""tiltune {__version__}: fine-tune diffusion samplers toward energies, and prove how close they came.

usage: tiltune VERB [options]          (tiltune VERB --help says more)

{chr(10).join(f"  {name:<8} {text}" for name, (_, text) in VERBS.items())}

example: tiltune 2d --objective rtb --out my-run
"""


def main() -> None:
    """Entry point of the console script; exit status 2 for bad input, 130 for Ctrl-C."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        raise SystemExit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        raise SystemExit(0)
    if arguments[0] not in VERBS:
        print(f"tiltune: unknown verb {arguments[0]!r}; choose one of {', '.join(VERBS)}.", file=sys.stderr)
        raise SystemExit(2)
    module = import_module(f".{VERBS[arguments[0]][0]}", __package__)
    try:
        status = module.main(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except ValueError as error:
        print(f"tiltune {arguments[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status)
