"""Versions: of tiltune, Python and the packages that decide whether a run works."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata

from ..._version import __version__
from .finding import Finding

PACKAGES = ("torch", "diffusers", "accelerate", "safetensors")


def versions() -> Iterator[Finding]:
    """Of tiltune, Python and the packages that decide whether a run works."""
    yield Finding("tiltune", __version__)
    yield Finding("python", f"{sys.version.split()[0]} at {sys.executable}")
    needs = requirements()
    for name in PACKAGES:
        version, need = installed(name), needs.get(name, "")
        wrong = None
        if version is None:
            wrong = f"{name} is not installed, and nothing runs without it; install tiltune again: pip install tiltune."
        elif not satisfies(version, need):
            wrong = f"{name} {version} is not what tiltune is made for ({name}{need}); pip install '{name}{need}'."
        yield Finding(name, version or "not installed", wrong)
    yield Finding("peft", installed("peft") or "not installed; LoRA policies need it: pip install peft")


def installed(package: str) -> str | None:
    """The version of ``package``; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, str]:
    """What the installed tiltune asks of other packages, as in {"torch": ">=2.10"}; empty if it runs from a folder."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("tiltune") or []
    except metadata.PackageNotFoundError:
        return {}
    return {need.name: str(need.specifier) for need in map(Requirement, lines) if need.marker is None}


def satisfies(version: str, need: str) -> bool:
    """Whether ``version`` is one that ``need`` allows, development versions included."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(need).contains(version, prereleases=True)
