"""Files of prompts: a line each, or a column of a table whose other columns are metadata. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.prior import PriorConfig

ENDINGS = (".txt", ".csv", ".json")
COLUMN = "prompt"


def from_file(prior: PriorConfig) -> PriorConfig:
    """The config with the prompts of a file in place of its name, where it names one.

    Errors: ValueError for a file that is not one of prompts.
    """
    if prior.prompts is None or prior.prompt_metadata:
        return prior
    files = [name for name in prior.prompts if Path(name).suffix.lower() in ENDINGS or _is_file(name)]
    if not files:
        return prior
    if len(prior.prompts) > 1 or Path(files[0]).suffix.lower() not in ENDINGS:
        raise ValueError(f"{files[0]} stands among prompts and is a file's name; give one file alone, {', '.join(ENDINGS)}.")
    texts, metadata = read_prompts(Path(files[0]).expanduser())
    return replace(prior, prompts=texts, prompt_metadata=metadata)


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except OSError:  # a prompt may be longer than any file's name
        return False


def read_prompts(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the prompts in a .txt, .csv or .json file, JSON of each one's metadata; empty where there is none).

    A .txt has a prompt a line, where empty lines count as nothing; a .csv has a column "prompt"; a .json is a list of strings,
    or of objects with a "prompt".

    Errors: ValueError for a file that cannot be read as one of these, or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    rows = _rows(path, text)
    if not rows:
        raise ValueError(f"{path} holds no prompt; write one a line.")
    empty = next((number for number, row in enumerate(rows, start=1) if not row[COLUMN].strip()), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} of {path} is empty; give it words, or take it out.")
    metadata = [{name: value for name, value in row.items() if name != COLUMN} for row in rows]
    texts = tuple(" ".join(row[COLUMN].split()) for row in rows)
    return texts, tuple(json.dumps(one) for one in metadata) if any(metadata) else ()


def _rows(path: Path, text: str) -> list[dict[str, Any]]:
    """Errors: ValueError for a file that is not what its ending says."""
    ending = path.suffix.lower()
    if ending == ".txt":
        return [{COLUMN: line} for line in text.split("\n") if line.strip()]
    try:
        found: Any = json.loads(text) if ending == ".json" else list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not {ending[1:].upper()}: {error}.") from None
    listed = [{COLUMN: one} if isinstance(one, str) else one for one in found] if isinstance(found, list) else []
    for number, row in enumerate(listed, start=1):
        if ending == ".csv" and (None in row or None in row.values()):
            raise ValueError(
                f"row {number} of {path} has not as many fields as its head; put a prompt that holds a comma into double quotes."
            )
    if (found and not listed) or any(not isinstance(one, dict) or not isinstance(one.get(COLUMN), str) for one in listed):
        raise ValueError(f"{path} has no {COLUMN!r} in each of its rows; a list of texts, or of rows with one, is read.")
    return listed
