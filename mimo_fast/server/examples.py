"""Sets of examples that conversions may be asked for by name, see `runtime/examples.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast.errors import ConfigError
from mimo_fast.runtime.examples import (
    NAME,
    SET,
    ExampleSet,
    check_sources,
    naming,
    read_set,
    set_of,
)

MOST = 64
"""Sets of a folder at most."""

DECODED = 8
"""Sets whose recordings are held; one of sixteen examples of 5 s has 15 MB."""


@dataclass(frozen=True)
class Named:
    """A set that may be asked for.

    Attributes:
        count: Number of its examples.
    """

    name: str
    path: Path
    instruction: str | None
    count: int

    def described(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "audio.examples",
            "name": self.name,
            "instruction": self.instruction,
            "examples": self.count,
            # There is no set without a note.
            "consent": True,
        }

    def read(self) -> ExampleSet:
        """Its examples, decoded."""
        return _decoded(self.path, (self.path / SET).stat().st_mtime_ns)


class ExampleSets:
    """The sets in a folder; names never become paths, they are looked up.

    Raises:
        ConfigError, AudioError: a set is wrong, as far as headers tell, or there are too many.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._seen = folder.stat().st_mtime_ns if folder else 0
        self._found = _read(folder) if folder else {}

    def __iter__(self) -> Iterator[Named]:
        self._refresh()
        return iter(self._found.values())

    def find(self, name: object) -> Named | None:
        self._refresh()
        return self._found.get(name) if isinstance(name, str) else None

    def _refresh(self) -> None:
        """Reads the folder again if sets came or went."""
        if self._folder is None:
            return
        # What cannot be read now is not offered.
        with suppress(OSError, ValueError):
            written = self._folder.stat().st_mtime_ns
            if written != self._seen:
                self._found, self._seen = _read(self._folder), written


@lru_cache(maxsize=DECODED)
def _decoded(path: Path, _written: int) -> ExampleSet:
    return read_set(path)


def _read(folder: Path) -> dict[str, Named]:
    found = dict[str, Named]()
    for path in sorted(folder.iterdir()):
        if not (path / SET).is_file() or path.name.startswith("."):
            continue
        if NAME.fullmatch(path.name) is None:
            problem = "its name must be 1 to 40 letters, digits, - and _"
            raise ConfigError(f"examples: {path} cannot be asked for: {problem}")
        sources, instruction, _ = set_of(path)
        with naming(str(path)):
            check_sources(sources)
        found[path.name] = Named(path.name, path, instruction, len(sources))
    if len(found) > MOST:
        raise ConfigError(f"examples: {folder} has more than {MOST} sets")
    return found


async def list_examples(request: Request) -> Response:
    """`GET /v1/audio/examples`."""
    found = [each.described() for each in request.app.state.examples]
    return JSONResponse({"object": "list", "data": found})
