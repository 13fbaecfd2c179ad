"""What one talks to: a dialogue, wherever it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

RATE = 24_000
"""Samples a second on both ways."""


@dataclass(frozen=True)
class Wishes:
    """What a dialogue is asked to be.

    Args:
        voice: of its replies: a recording's path in this process, a name at a server.
        by_hand: turns end by `Partner.take_turn` alone.
    """

    instructions: str | None = None
    voice: str | None = None
    by_hand: bool = False


class Listener(Protocol):
    """Told, in the event loop, what happens in a dialogue. Nothing may wait."""

    def turn_began(self) -> None: ...
    def turn_ended(self) -> None: ...
    def user_said(self, item: str, text: str, whole: bool) -> None:
        """More of what the user said, or all of it."""
        ...

    def reply_began(self, item: str) -> None: ...
    def reply_said(self, item: str, text: str, audio: np.ndarray) -> None:
        """More of a reply: words and samples, float32 [n]; either may be empty."""
        ...

    def reply_ended(self, item: str | None, problem: str | None) -> None:
        """item: None where it had not begun. problem: why it is not complete, if it failed."""
        ...

    def failed(self, problem: str) -> None:
        """Something that was asked for could not be done; the talk goes on."""
        ...

    def gone(self, error: Exception) -> None:
        """The talk is over."""
        ...


class Partner(Protocol):
    """A dialogue; all of it is used in one event loop."""

    async def open(self, listener: Listener) -> None: ...
    async def hear(self, wav: np.ndarray) -> None:
        """More of what the user says, float32 [n]."""
        ...

    async def begin_turn(self) -> None:
        """By hand: forgets what was sent before, and ends the reply in progress."""
        ...

    async def take_turn(self) -> None:
        """By hand: what was sent is a turn, and is answered."""
        ...

    async def truncate(self, item: str, heard_ms: float) -> None:
        """Drops what was not heard of a reply; ends it, if it is in progress."""
        ...

    async def close(self) -> None: ...
