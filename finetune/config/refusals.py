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
        for choices in [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]:
            value, allowed = getattr(config, name), get_args(choices)
            missing = value is None and type(None) in get_args(hint)
            refuse(value not in allowed and not missing, f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
