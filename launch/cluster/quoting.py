"""A word of the command line as text of another language: bash, YAML."""

from __future__ import annotations

import os
import shlex
import sys


def shell(word: str) -> str:
    """``word`` quoted for bash, on one line whatever it holds."""
    if word.isprintable():
        return shlex.quote(word)
    plain = "".join(c if c.isprintable() and c not in "'\\" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in word)
    return f"$'{plain}'"


def yaml_text(word: str) -> str:
    """``word`` as a YAML string, on one line whatever it holds.

    Errors: ValueError for bytes that are no text, which YAML cannot hold.
    """
    import yaml

    if any("\ud800" <= c <= "\udfff" for c in word):
        raise ValueError(f"{word!r} holds bytes that are no UTF-8, which a YAML file cannot pass on; rename what it names.")
    return yaml.safe_dump(word, default_style='"', width=sys.maxsize).strip()
