"""`RunConfig` as flags: every field under a flat name of its own, whatever section of the YAML it belongs to."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from ..finetune.config.prior import PriorConfig
from ..finetune.config.run import RunConfig
from ..finetune.config.yaml_file import from_mapping, to_mapping

POSITIONAL = tyro.conf.Positional
RunFolder = Annotated[Path, POSITIONAL, tyro.conf.arg(metavar="RUN")]
# Where the field's own name would say too little, or is taken.
RENAMED = {
    "prior.source": "prior",
    "prior.seed": "prior-seed",
    "energy.terms": "energy",
    "energy.workers": "energy-workers",
    "energy.timeout": "energy-timeout",
    "policy.kind": "policy",
    "certificate.size": "certificate-size",
    "certificate.seed": "certificate-seed",
    "certificate.tolerance": "certificate-tolerance",
}


def flags(base: RunConfig, own: type, tasks: tuple[str, ...]) -> type:
    """A dataclass for tyro: the positional TASK, the fields of ``own``, and every field of the config with ``base``'s value.

    It checks nothing: `with_flags` builds the config, once all values are known.
    """
    members = [_task(tasks)]
    for name, hint in get_type_hints(RunConfig).items():
        value = getattr(base, name)
        if is_dataclass(hint):
            section = _unchecked(hint, f"{name}.")
            members.append((name, section, field(default=section(**_values(value)))))
        elif name != "task":
            members.append((name, hint, field(default=value)))
    return make_dataclass("Options", members, bases=(RunConfig, own), frozen=True, namespace=_NO_CHECKS)


def with_prior(base: PriorConfig, own: type, tasks: tuple[str, ...]) -> type:
    """A dataclass for tyro: the positional TASK, the fields of ``own``, and every field of the prior's config with ``base``'s
    value, under the names that `flags` gives them."""
    section = _unchecked(PriorConfig, "prior.")
    members = [_task(tasks), ("prior", section, field(default=section(**_values(base))))]
    return make_dataclass("Options", members, bases=(own,), frozen=True, kw_only=True)


def built(kind: type, section: Any) -> Any:
    """The config's section that its unchecked flags say. Errors: ValueError for what it refuses."""
    return kind(**_values(section))


def parse(options: type, argv: list[str], prog: str, description: str) -> Any:
    """The command line as ``options``; tyro prints help and its own errors (status 2).

    Errors: ValueError for a flag that is given twice, of which only the last would count.
    """
    given = Counter(word.split("=")[0].replace("_", "-") for word in argv if word.startswith("--"))
    for name, count in given.items():
        if count > 1:
            raise ValueError(f"{name} is given {count} times; give it once, with all its values after it: {name} A B.")
    return tyro.cli(options, args=argv, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,))


def given(command: list[str], flag: str) -> str | None:
    """The last value of a flag in a command that is passed on unread; None where it is not there."""
    values = [word.partition("=")[2] for word in command if word.startswith(f"{flag}=")]
    values += [after for word, after in pairwise(command) if word == flag]
    return values[-1] if values else None


def with_flags(base: RunConfig, options: Any) -> RunConfig:
    """The config that the parsed ``options``, made from ``base``, say."""
    values = {name: getattr(options, name) for name in to_mapping(base) if name != "task"}
    sections = {name: asdict(value) for name, value in values.items() if is_dataclass(value) and not isinstance(value, type)}
    return from_mapping(values | sections, base, "")


def _task(tasks: tuple[str, ...]) -> Any:
    """The member of the positional TASK."""
    return "task", Annotated[Literal[tasks] | None, POSITIONAL, tyro.conf.arg(metavar="[TASK]")], field(default=None)


def _unchecked(section: Any, path: str) -> Any:
    """A config's section with its fields and texts but without its checks; flags named as `RENAMED` says."""
    hints = get_type_hints(section)
    renamed = [
        (item.name, Annotated[hints[item.name], tyro.conf.arg(name=RENAMED[path + item.name])], field(default=item.default))
        for item in fields(section)
        if path + item.name in RENAMED
    ]
    return make_dataclass(
        section.__name__, renamed, bases=(section,), frozen=True, namespace=_NO_CHECKS | {"__doc__": section.__doc__}
    )


def _values(section: Any) -> dict[str, Any]:
    return {item.name: getattr(section, item.name) for item in fields(section)}


_NO_CHECKS = {"__post_init__": lambda self: None}
