"""Text files that people hand in, and JSON in them: what could be read in two ways is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark, which some editors write and which would be a text's first token.

    Raises OSError and UnicodeDecodeError.
    """
    return path.read_text("utf-8-sig")


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError (json.JSONDecodeError where it is no JSON), also for a key that one object holds twice: JSON
    leaves open which counts; RecursionError for one that is nested too deep."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return made


def has_surrogate(text: str) -> bool:
    """Half a character: JSON can say it, UTF-8 and tokenizers cannot."""
    return any("\ud800" <= character <= "\udfff" for character in text)
