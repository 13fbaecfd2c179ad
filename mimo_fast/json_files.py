"""JSON of foreign files: regular files of a bounded size, objects without surprises.

Whatever is wrong is a ConfigError before anything else of the file is used: a FIFO or a device is
never opened, and neither size, nesting nor repeated keys can reach the code that reads fields.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mimo_fast.errors import ConfigError

JSON_BYTES = 64 * 2**20
"""Size of a JSON file at most; tokenizers of 250,000 tokens have 35 MB."""

DEPTH = 48
"""Objects and lists inside each other at most; what a checkpoint needs is eight."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def shown(value: Any) -> str:
    """A foreign value in an error message: one line of bounded length."""
    try:
        return cut(repr(value), 200)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


def cut(text: Any, limit: int = 300) -> str:
    """The first line of a text, or of an error's, of bounded length."""
    line = " ".join(str(text).split("\n", 1)[0].split()) or type(text).__name__
    return line if len(line) <= limit else f"{line[:limit]}..."


def regular_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a regular file, links followed. Nothing is opened, so that nothing can hang.

    Raises:
        OSError: it is missing, out of reach, or no regular file.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(None, f"it is {kind}, not a file", os.fspath(path))
    return found.st_size


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        ConfigError: it is missing, out of reach, no regular file, or too large.
    """
    try:
        size = regular_size(path)
        if size > limit:
            raise ConfigError(
                f"{path} has {size} bytes, where at most {limit} are read: download it again"
            )
        with path.open("rb") as file:
            return file.read(limit)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or cut(error)
        raise ConfigError(f"cannot read {path}: {reason}") from error


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The object in a JSON text in UTF-8; `source` is what errors call it.

    Raises:
        ConfigError: the text is not valid JSON or no object, a key is repeated, or it is nested
            deeper than `DEPTH`.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        raw = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise ConfigError(f"{source} is not valid JSON: {cut(error)}") from error
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply: download it again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} holds a {type(raw).__name__}, not a JSON object")
    level: list[Any] = [raw]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return raw
    raise ConfigError(f"{source} is nested deeper than {DEPTH} levels: download it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: the file is missing, unreadable, too large, not a regular file, or not a JSON
            object as `parse_json` takes it.
    """
    return parse_json(read_bytes(path), str(path))


def _inner(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return (each for each in inner if isinstance(each, dict | list) and each)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; readers disagree on which of two equal keys counts, so neither does."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(repeated)} is given twice")
    return found
