"""Energies by name, as the command line and YAML give them: ``0.5*my_energy.py:closeness(3, width=.5)``.

Reading a spec imports nothing, not even torch.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from .error import EnergyError, user_line, user_trace

if TYPE_CHECKING:
    from .energy import Energy
    from .weighted_sum import WeightedSum

_SCALED = re.compile(r"([^*:(]*?)\s*\*\s*(.*)", re.DOTALL)
_CALL = r"(?P<name>[^\W\d]\w*)\s*(?P<call>\(.*\))?"
_TARGETS = (re.compile(f"(?P<place>){_CALL}", re.DOTALL), re.compile(rf"(?P<place>(?:[A-Za-z]:)?[^:*]+?):{_CALL}", re.DOTALL))
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class EnergySpec:
    """``scale*place:name(arguments)``, read.

    place: a .py file, a dotted module, or "" for a name of the chosen task's module. call: the parentheses as written, ""
    where there are none, and then the named object is the energy itself; with them it is called, and returns the energy.
    """

    scale: float
    place: str
    name: str
    call: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def label(self) -> str:
        """``name(arguments)``: how the log calls it."""
        return self.name + self.call

    @property
    def title(self) -> str:
        """``name(arguments) of mine.py``: what messages call it."""
        return f"{self.label} of {Path(self.place).name}" if _is_file(self.place) else self.target

    @property
    def target(self) -> str:
        """``place:name(arguments)``, without the scale."""
        return f"{self.place}:{self.label}" if self.place else self.label


def parse_energy(spec: str) -> EnergySpec:
    """Read a spec without importing anything.

    Errors: ValueError for what is not ``[scale*][place:]name[(literals)]``.
    """
    text, scale = spec.strip(), 1.0
    if match := _SCALED.fullmatch(text):
        try:
            scale = float(match[1])
        except ValueError:
            raise ValueError(f"the scale {match[1]!r} of energy {spec!r} is not a number; write 0.5*{match[2]}.") from None
        if not math.isfinite(scale) or scale == 0:
            raise ValueError(f"the scale of energy {spec!r} is {scale}; it must be finite and not zero (leave the term out).")
        text = match[2]
    for pattern in _TARGETS:
        match = pattern.fullmatch(text)
        if match and (call := _parsed_call(match["call"])):
            arguments = tuple(_literal(spec, node) for node in call.args)
            keywords = {_keyword(spec, item): _literal(spec, item.value) for item in call.keywords}
            return EnergySpec(scale, match["place"].strip(), match["name"], match["call"] or "", arguments, keywords)
    if ":" not in text and "(" not in text and ("." in text or "/" in text or "\\" in text):
        raise ValueError(f"energy {spec!r} names no function; write {text}:name.")
    raise ValueError(
        f"energy {spec!r} cannot be read; write file.py:name, package.module:name or a name of the task, with Python literals in"
        " parentheses where the name is a factory, as in file.py:name(3, width=0.5)."
    )


def load_energy(spec: str, search: str | None = None) -> Energy:
    """The energy that a spec names; with a scale, a `WeightedSum` of that one term.

    A file is imported under a private name, and again when its text has changed; what lies beside it is importable relatively
    (``from .helper import f``) and otherwise not, so that a neighbor called random.py shadows nothing.

    search: the module where a name without file or module is looked up, such as "tiltune.tasks.digits".

    Errors: ValueError with one sentence for whatever keeps the energy from being there; an EnergyError where the user's code
    raised, with its lines. An interrupt stays one.
    """
    parsed = parse_energy(spec)
    if parsed.scale != 1:
        return combine([spec], search)
    return _load(parsed, search)


def combine(specs: Sequence[str], search: str | None = None) -> WeightedSum:
    """The weighted sum of the energies that ``specs`` name, each with its own scale, under their labels, or the whole
    targets where labels repeat.

    Errors: ValueError for no spec or one given twice, and those of `load_energy`.
    """
    from .weighted_sum import WeightedSum

    parsed = [parse_energy(spec) for spec in specs]
    labels, targets = [one.label for one in parsed], [one.target for one in parsed]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(
                f"energy {target!r} is given {targets.count(target)} times; give it once, with the sum of the scales."
            )
    names = [one.label if labels.count(one.label) == 1 else one.target for one in parsed]
    total = WeightedSum({name: (one.scale, _load(one, search)) for name, one in zip(names, parsed, strict=True)})
    total.titles.update({name: one.title for name, one in zip(names, parsed, strict=True) if _is_file(one.place)})
    return total


# --- reading ---------------------------------------------------------------------------------------------------------


def _parsed_call(call: str | None) -> ast.Call | None:
    """f(...) as a syntax tree; None for what is not one call."""
    try:
        body = ast.parse(f"f{call or '()'}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return body if isinstance(body, ast.Call) and isinstance(body.func, ast.Name) else None


def _literal(spec: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"the argument {ast.unparse(node)} of energy {spec!r} is not a Python literal; write numbers, strings, True, False,"
            " None, and lists, tuples, sets or dicts of them."
        ) from None


def _keyword(spec: str, item: ast.keyword) -> str:
    if item.arg is None:
        raise ValueError(f"energy {spec!r} has ** among its arguments, which are literals only; write name=value.")
    return item.arg


# --- importing -------------------------------------------------------------------------------------------------------


def _load(spec: EnergySpec, search: str | None) -> Energy:
    if not spec.place and search is None:
        raise ValueError(
            f"energy {spec.target!r} names neither a file nor a module, and no task is chosen that could have it; write"
            f" file.py:{spec.label} or package.module:{spec.label}."
        )
    place = spec.place or search or ""
    module = _import_file(spec) if _is_file(place) else _import_module(spec, place)
    if not hasattr(module, spec.name):
        raise ValueError(f"energy {spec.target!r}: {place} has no {spec.name}; {_nearest(spec.name, module)}.")
    named = getattr(module, spec.name)
    if not callable(named):
        raise ValueError(f"energy {spec.target!r}: {spec.name} in {place} is not callable, it is a {type(named).__name__}.")
    if not spec.call:
        if isinstance(named, type):
            raise ValueError(f"energy {spec.target!r} is a class, not an energy; make one of it: {spec.target}(...).")
        return cast("Energy", named)
    try:
        energy = named(*spec.arguments, **spec.keywords)
    except (Exception, SystemExit) as error:
        hint = f"; if {spec.name} itself is the energy, write it without parentheses" if isinstance(error, TypeError) else ""
        raise EnergyError(f"energy {spec.target!r}: the call {_raised(error)}{hint}.", user_trace(error)) from error
    if not callable(energy) or isinstance(energy, type):
        raise ValueError(
            f"energy {spec.target!r}: the call returned {type(energy).__name__}, not an energy; if {spec.name} itself is the"
            " energy, write it without parentheses."
        )
    return cast("Energy", energy)


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _import_file(spec: EnergySpec) -> ModuleType:
    path = Path(spec.place).expanduser()
    if path.suffix != ".py":
        raise ValueError(f"energy {spec.target!r}: {path} is not a .py file.")
    try:
        path = path.resolve()
        source = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"energy {spec.target!r}: there is no file {path}.") from None
    except OSError as error:
        raise ValueError(f"energy {spec.target!r}: {path} cannot be read ({error.strerror}).") from error
    package = f"_tiltune_energy_{_digest(str(path.parent).encode())}"
    name = f"{package}.file_{_digest(path.name.encode() + source)}"
    if name in sys.modules:
        return sys.modules[name]
    if package not in sys.modules:  # the folder, so that relative imports find what lies beside the file
        folder = ModuleType(package)
        folder.__path__ = [str(path.parent)]
        sys.modules[package] = folder
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raise EnergyError(f"energy {spec.target!r}: importing {path} {_raised(error)}.", user_trace(error)) from error
    return module


def _import_module(spec: EnergySpec, place: str) -> ModuleType:
    if not _MODULE.fullmatch(place):
        raise ValueError(f"energy {spec.target!r}: {place!r} is neither a .py file nor the dotted name of a module.")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise EnergyError(f"energy {spec.target!r}: importing {place} {_raised(error)}.", user_trace(error)) from error
        file = f"{place.replace('.', '/')}.py"
        hint = f"; for the file, write {file}:{spec.label}" if Path(file).is_file() else ""
        raise ValueError(f"energy {spec.target!r}: there is no module {error.name}{hint}.") from None
    except (Exception, SystemExit) as error:
        raise EnergyError(f"energy {spec.target!r}: importing {place} {_raised(error)}.", user_trace(error)) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _nearest(name: str, module: ModuleType) -> str:
    named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    own = [key for key in named if getattr(vars(module)[key], "__module__", None) == module.__name__]
    if near := difflib.get_close_matches(name, own or named):
        return f"did you mean {' or '.join(near)}?".removesuffix("?")
    return f"it defines {', '.join(own[:8])}" if own else "it defines no function"


def _raised(error: BaseException) -> str:
    """What was raised, and on which of the user's lines."""
    said = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"raised {type(error).__name__}{user_line(error)}" + (f" ({said})" if said else "")
