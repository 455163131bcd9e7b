"""Files of prompts: a line each, or a column of a table whose other columns are metadata. Imports no torch."""

from __future__ import annotations

import csv
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
    named = Path(prior.prompts[0]).expanduser() if prior.prompts is not None and len(prior.prompts) == 1 else None
    if named is None or named.suffix not in ENDINGS:
        return prior
    texts, metadata = read_prompts(named)
    return replace(prior, prompts=texts, prompt_metadata=metadata)


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
    texts = tuple(row[COLUMN].strip() for row in rows)
    return texts, tuple(json.dumps(one) for one in metadata) if any(metadata) else ()


def _rows(path: Path, text: str) -> list[dict[str, Any]]:
    if path.suffix == ".txt":
        return [{COLUMN: line} for line in text.splitlines() if line.strip()]
    if path.suffix == ".csv":
        found = list(csv.DictReader(text.splitlines()))
    else:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
    listed = [{COLUMN: one} if isinstance(one, str) else one for one in found] if isinstance(found, list) else []
    if (found and not listed) or any(not isinstance(one, dict) or not isinstance(one.get(COLUMN), str) for one in listed):
        raise ValueError(f"{path} has no {COLUMN!r} in each of its rows; a list of texts, or of rows with one, is read.")
    return listed
