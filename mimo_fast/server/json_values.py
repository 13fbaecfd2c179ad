"""JSON that strangers send, within bounds.

Parsing holds the interpreter's lock in whichever thread it runs, so a message of millions of values
would stop every session for seconds, and take 60 bytes of memory for two of its own. Whatever the
API takes has a few thousand values, however long its texts and recordings are.
"""

from __future__ import annotations

import json
from typing import Any

MOST_VALUES = 2**16
"""Values of a message at most."""

MOST_DEPTH = 64
"""Levels of a message at most: others than the parser, such as copying, recurse too."""


def parse_json(data: bytes | str) -> Any:
    """The value that JSON stands for; numbers are finite.

    Raises:
        ValueError: it is no JSON, is not in UTF-8, or has too many values or levels.
    """
    if _marks(data) > MOST_VALUES:
        raise ValueError(f"the JSON has more than {MOST_VALUES} values")
    try:
        found = json.loads(data, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("the JSON is too deep") from None
    _check_depth(found)
    return found


def _marks(data: bytes | str) -> int:
    """How many values there may be, without parsing: what is in texts counts, too."""
    if isinstance(data, bytes):
        return sum(map(data.count, (b",", b":", b"[", b"{")))
    return sum(map(data.count, ",:[{"))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inside = [each for each in level if isinstance(each, dict | list)]
        if not inside:
            return
        level = [
            part for each in inside for part in (each.values() if isinstance(each, dict) else each)
        ]
    raise ValueError(f"the JSON is deeper than {MOST_DEPTH} levels")
