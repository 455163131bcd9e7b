"""How a config refuses a value that no run can have."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


def refuse(wrong: bool, message: str) -> None:
    """Errors: ValueError with ``message`` where ``wrong``."""
    if wrong:
        raise ValueError(message)


def refuse_other_choices(config: Any) -> None:
    """Errors: ValueError for a value that its field's Literal does not list."""
    for name, hint in get_type_hints(type(config)).items():
        value, parts = getattr(config, name), [hint] if get_origin(hint) is Literal else list(get_args(hint))
        # A union may admit None, or another type.
        besides = any(isinstance(value, get_origin(part) or part) for part in parts if isinstance(get_origin(part) or part, type))
        for choices in [part for part in parts if get_origin(part) is Literal]:
            allowed = get_args(choices)
            refuse(value not in allowed and not besides, f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
