"""What makes a folder a whole checkpoint: its name, and a manifest of its files with sizes and SHA-256, written last.

    {"format": 1, "step": 40, "files": {"policy/config.json": {"size": 310, "sha256": "…"}, …}}

A manifest tells damage from a good file; it does not tell who wrote either. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


def name_of(step: int) -> str:
    """The name of the checkpoint of ``step``."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of what `is_checkpoint`."""
    return int(path.name.removeprefix("step-"))


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is named like a checkpoint."""
    return re.fullmatch(r"step-[0-9]{8,18}", path.name) is not None and path.name == name_of(step_of(path))


def seal(folder: Path, step: int) -> None:
    """Everything in ``folder`` to the disk, and its manifest last."""
    files, odd = _contents(folder)
    assert not odd and MANIFEST not in files, (odd, files)
    entries = {}
    for name in sorted(files):
        sync(folder / name)
        entries[name] = {"size": files[name], "sha256": _digest(folder / name)}
    for inner, _, _ in os.walk(folder, topdown=False):
        sync(Path(inner))
    write_file(folder / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=2) + "\n")
    sync(folder)


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint in ``path``, each problem in words; empty for a good one.

    Reads every file once. A symbolic link is a problem, and so is a file that the manifest does not list.
    """
    if path.is_symlink() or not path.is_dir():
        return ["it is no folder" if os.path.lexists(path) else "there is no such folder"]
    try:
        step, entries = _read_manifest(path / MANIFEST)
        files, problems = _contents(path)
        if is_checkpoint(path) and step != step_of(path):
            problems.append(f"{MANIFEST} is of step {step}")
        problems += [f"{name!r} is not in {MANIFEST}" for name in sorted(files.keys() - entries.keys() - {MANIFEST})]
        for name, (size, digest) in sorted(entries.items()):
            if not _stays_inside(name):
                problems.append(f"{MANIFEST} lists {name!r}, which is no place in this folder")
            elif name not in files:
                problems.append(f"{name!r} is missing")
            elif files[name] != size:
                problems.append(f"{name!r} has {files[name]} bytes instead of {size}")
            elif _digest(path / name) != digest:
                problems.append(f"{name!r} has changed since it was saved (its SHA-256 is another)")
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"it cannot be read ({error})"]
    return problems


def write_file(path: Path, text: str) -> None:
    """A text file, on the disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """A text file in place of the one that may be there, at once or not at all."""
    temporary = path.with_name(f".{path.name}")
    write_file(temporary, text)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's content or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The step, and {name: (size in bytes, SHA-256)}; names unchecked.

    Errors: ValueError for anything else than a manifest of `FORMAT`.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{MANIFEST} is missing, which is written last")
    try:
        manifest: Any = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{MANIFEST} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is not JSON ({error})") from None
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise ValueError(f"{MANIFEST} does not say what format it has")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} has the format {manifest['format']}, and this version of tiltune reads {FORMAT}")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise ValueError(f"{MANIFEST} does not say which step and files it is of")
    entries = {}
    for name, entry in files.items():
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise ValueError(f"{MANIFEST} does not say the size and SHA-256 of {name!r}")
        entries[name] = size, digest
    return step, entries


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and not {".", ".."} & set(path.parts) and not {"\\", "\0"} & set(name)


def _contents(folder: Path) -> tuple[dict[str, int], list[str]]:
    """{relative name of a regular file: bytes}, and a problem for everything that is neither file nor folder."""
    files, odd = {}, []

    def refuse(error: OSError) -> None:
        raise error

    for inner, folders, names in os.walk(folder, onerror=refuse):
        for name in (*folders, *names):
            path = Path(inner, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                odd.append(f"{relative!r} is neither a file nor a folder")
            elif path.is_file():
                files[relative] = path.stat().st_size
    return files, odd


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
