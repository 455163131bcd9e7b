"""`RunConfig` as YAML: sections of plain values, where every key and type is checked and named when it is wrong.

Only plain data is read. Without torch.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .run import RunConfig

RENAMED = {"train.bank_size": "train.population_size", "prior.label": "prior.labels, a list,"}  # since 0.3.0


def to_mapping(config: Any) -> dict[str, Any]:
    """A config as nested dicts of what YAML can hold; `from_mapping` gives it back."""
    return _plain(asdict(config))


def to_yaml(config: RunConfig) -> str:
    """A config as YAML, every field written out, so that it repeats the run whatever the defaults become."""
    import yaml

    return yaml.dump(to_mapping(config), Dumper=_yaml()[1], sort_keys=False, allow_unicode=True, width=130)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, keys and types not checked yet.

    Errors: ValueError for a file that is missing, unreadable, not YAML, or that names a key twice.
    """
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_yaml()[0])
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; --print-config prints one to start from.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a text file: {error}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a config.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path} is not YAML that can be used here: {problem}{where}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {_kind(values)}, not the sections of a config; --print-config prints one.")
    return values


def from_mapping(values: dict[str, Any], base: RunConfig, where: str) -> RunConfig:
    """``base`` with what ``values`` (nested as the config) says in its place; ``where`` they come from, for errors.

    Errors: ValueError for an unknown key (with the nearest), a wrong type (with the expected one), or a value no run can have.
    """
    return _build(RunConfig, values, to_mapping(base), where, "")


def _build(kind: type, values: dict[str, Any], base: dict[str, Any], where: str, path: str) -> Any:
    hints = get_type_hints(kind)
    merged: dict[str, Any] = {}
    for key in values:
        if _dotted(path, key) in RENAMED:
            raise ValueError(f"{where}: {_dotted(path, key)} is called {RENAMED[_dotted(path, key)]} now.")
        if key not in hints:
            raise ValueError(f"{where}: unknown key {_dotted(path, key)}; {_nearest(kind, path, key)}.")
    for name, hint in hints.items():
        here = _dotted(path, name)
        if is_dataclass(hint):
            section = values.get(name)
            section = {} if section is None else section
            if not isinstance(section, dict):
                raise ValueError(f"{where}: {here} is {_kind(section)}; it is a section with the keys {', '.join(_names(hint))}.")
            merged[name] = _build(hint, section, base[name], where, here)  # pyright: ignore[reportArgumentType]
        else:
            value = values.get(name, base[name])
            try:
                merged[name] = _checked(value, hint)
            except TypeError:
                raise ValueError(f"{where}: {here} is {_kind(value)}; expected {_expected(hint)}.") from None
    try:
        return kind(**merged)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _checked(value: Any, hint: Any) -> Any:
    """The value as its type has it (an int as a float, a list as a tuple); TypeError where it is none of it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        for part in arguments:
            if part is not NoneType:
                with suppress(TypeError):
                    return _checked(value, part)
        raise TypeError
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_checked(item, arguments[0]) for item in value)
    elif origin is dict:
        if isinstance(value, dict):
            return {_checked(key, arguments[0]): _checked(item, arguments[1]) for key, item in value.items()}
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is hint:  # a bool is no int here
        return value
    raise TypeError


def _expected(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else _expected(part) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return f"a mapping of {_plural(arguments[0])} to {_plural(arguments[1])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint]


def _plural(hint: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "strings"}[hint]


def _kind(value: Any) -> str:
    """A wrong value and what it is, short whatever its size."""
    names = {NoneType: "null", bool: "a boolean", int: "a whole number", float: "a number", str: "a string"}
    name = names.get(
        type(value), "a list" if isinstance(value, list | tuple) else "a mapping" if isinstance(value, dict) else "?"
    )
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother = 2, 60, 60
    return name if value is None else f"{shown.repr(value)}, {name}"


def _nearest(kind: type, path: str, key: Any) -> str:
    """Where the key was probably meant to go: this section first, then any."""
    close = difflib.get_close_matches(str(key), _names(kind), 1)
    if close:
        return f"did you mean {_dotted(path, close[0])}"
    homes = {leaf.rpartition(".")[2]: leaf for leaf in leaves()}
    close = difflib.get_close_matches(str(key), homes, 1)
    if close:
        return f"did you mean {homes[close[0]]}"
    return f"{path or 'the top level'} has the keys {', '.join(_names(kind))}"


@cache
def leaves() -> tuple[str, ...]:
    """Every field of a run by its place: 'task', 'prior.source', …"""

    def walk(kind: Any, path: str) -> list[str]:
        found = []
        for name, hint in get_type_hints(kind).items():
            here = _dotted(path, name)
            found += walk(hint, here) if is_dataclass(hint) else [here]
        return found

    return tuple(walk(RunConfig, ""))


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _dotted(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@cache
def _yaml() -> tuple[Any, Any]:
    """PyYAML's safe loader and dumper, with 2e-4 and -.5 as numbers, as YAML 1.2 has them, and no key twice in a mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):
        """Quotes the strings that the loader would take for numbers."""

    number = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$")
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader, Dumper
