"""A dialect for tests: everything that the core tells its client, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mimo_fast.server.realtime.dialogue import Dialogue
from mimo_fast.server.service import Service


class Log:
    """Implements `Wire`.

    Attributes:
        events: (name, arguments).
        open: Whether the client reads.
        most: Pieces of replies after which it stops to.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[Any, ...]]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.most: int | None = None
        self._news = asyncio.Event()

    async def ready(self) -> None:
        if self.most is not None and len(self.all("said")) >= self.most:
            self.open.clear()
        await self.open.wait()

    def silence(self) -> list[Any]:
        return []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)

        def note(*arguments: Any) -> None:
            self.events.append((name, arguments))
            self._news.set()

        return note

    def names(self) -> list[str]:
        """Names of the events, one of several alike in a row."""
        found: list[str] = []
        for name, _ in self.events:
            if not found or found[-1] != name:
                found.append(name)
        return found

    def all(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for each, arguments in self.events if each == name]

    async def until(self, name: str, count: int = 1, seconds: float = 30) -> tuple[Any, ...]:
        """The arguments of the event of this name, the so-manyth."""
        async with asyncio.timeout(seconds):
            while len(self.all(name)) < count:
                self._news.clear()
                await self._news.wait()
        return self.all(name)[count - 1]

    def text(self, response: Any) -> str:
        return "".join(text for each, text, _ in self.all("said") if each is response)

    def audio(self, response: Any) -> bytes:
        return b"".join(audio for each, _, audio in self.all("said") if each is response)


def dialogue(service: Service, longest: float = 60) -> tuple[Dialogue, Log]:
    log = Log()
    return Dialogue(service, log, longest, "test"), log


async def speak(dialogue: Dialogue, data: bytes, piece: int = 4800, pace: float = 4.0) -> None:
    """Sends audio at so many times real time."""
    for at in range(0, len(data), piece):
        await dialogue.hear(data[at : at + piece])
        await asyncio.sleep(piece / 48000 / pace)
    await dialogue.heard()
