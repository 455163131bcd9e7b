"""`tiltune completion`: a shell script that completes verbs, flags, their choices, tasks and files."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal, get_args

from ...tasks.task import TASKS
from .. import flags
from ..cli import VERBS
from . import checkpoint, study

Shell = Literal["bash", "zsh", "fish"]

DESCRIPTION = """Print a script that completes verbs, tasks, flags and their choices. For bash, put the line below into
~/.bashrc; for zsh, the same with zsh into ~/.zshrc; for fish, `tiltune completion fish | source`.

example: source <(tiltune completion bash)
"""


@dataclass(frozen=True)
class Options:
    """What `tiltune completion` takes."""

    shell: Annotated[Shell, flags.POSITIONAL]


def main(argv: list[str]) -> int:
    """Run the verb; returns its exit status."""
    print(script(flags.parse(Options, argv, "tiltune completion", DESCRIPTION).shell))
    return 0


def script(shell: str) -> str:
    """tyro's completion for all verbs in one parser, with what it leaves out: the tasks, and files where nothing else fits."""
    import tyro

    verbs = {name: import_module(f".{module}", __package__).Options for name, (module, _) in VERBS.items()}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        arguments = ["--tyro-print-completion", shell]
        tyro.extras.subcommand_cli_from_dict(verbs, args=arguments, prog="tiltune", config=(tyro.conf.OmitArgPrefixes,))
    text = printed.getvalue().replace("complete -F", "complete -o default -F")
    # Positional choices are missing from tyro's table; one completes like a flag that takes no value.
    positional = {"train": tuple(TASKS), "checkpoint": get_args(checkpoint.Action)}
    positional |= {"study": get_args(study.Name), "completion": get_args(Shell)}
    for verb, choices in positional.items():
        added = "".join(f"{{'flags': ['{name}'], 'description': '{verb} {name}', 'type': 'flag'}}, " for name in choices)
        text = re.sub(
            rf"('{verb}': \{{'description': .*?'options': \[)", lambda found, added=added: found[1] + added, text, count=1
        )
    return text
