"""What is seen of a talk: both sides as they are heard, the state in words, latencies."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from time import monotonic
from typing import TextIO

ERASE = "\r\x1b[K"
YOU, REPLY = "you:   ", "reply: "

LATE = 3.0
"""Seconds after a reply in which the words that it answers may still become known."""


@dataclass
class _Line:
    """A turn of either side."""

    name: str | None
    prefix: str
    text: str = ""
    shown: int = 0
    begun: bool = False
    whole: bool = False
    remark: str = ""
    ended: float | None = None


class Screen:
    """The transcript on standard output, in the order of the talk; the rest on standard error.

    A turn is written while it is heard, unless one before it is still being written: what a user
    said may be known after the reply has begun.
    """

    def __init__(self) -> None:
        # As they are now: a command replaces them.
        self._out, self._err = sys.stdout, sys.stderr
        self._one = _is_terminal(self._out)
        self._draws = _is_terminal(self._err)
        self._lines = list[_Line]()
        self._state = self._drawn = ""
        self._partial = False

    def user_turn(self) -> None:
        """A turn of the user is over; its words will come."""
        self._lines.append(_Line(None, YOU))

    def user_said(self, name: str, text: str, whole: bool) -> None:
        line = self._find(name, YOU)
        if line is None:
            unnamed = (line for line in self._lines if line.prefix is YOU and line.name is None)
            line = next(unnamed, None)
        if line is None:
            if whole:
                self.note(f"you said: {_clean(text)}")
            return
        line.name = name
        if not whole:
            line.text += text
        elif not line.text:
            line.text = text
        line.whole = whole
        self._write()

    def reply_begins(self, name: str) -> None:
        self._lines.append(_Line(name, REPLY))

    def reply_says(self, name: str, text: str) -> None:
        line = self._find(name, REPLY)
        if line is not None:
            line.text += text
            self._write()

    def timed(self, name: str, seconds: float) -> None:
        """The first audio of a reply was heard so long after the turn."""
        line = self._find(name, REPLY)
        if line is not None:
            line.remark = f"({round(1000 * seconds)} ms)"

    def reply_ends(self, name: str, remark: str = "") -> None:
        line = self._find(name, REPLY)
        if line is None:
            return
        line.whole, line.remark = True, " ".join(filter(None, (remark, line.remark)))
        line.ended = monotonic()
        self._write()

    def note(self, text: str) -> None:
        """A remark of its own."""
        self._erase()
        if self._partial and self._one:
            self._put(self._out, "\n")
            self._partial = False
        self._put(self._err, f"{text}\n")

    def show(self, state: str) -> None:
        """The state in words: at the end of a terminal, or a line when it changes."""
        self._give_up()
        if state != self._state:
            self._state = state
            if not self._draws:
                self._put(self._err, f"[{state}]\n")
        if self._draws and self._drawn != state and not (self._partial and self._one):
            self._put(self._err, f"{ERASE}[{state}]")
            self._drawn = state

    def _give_up(self) -> None:
        """Words of the user that do not become known are not waited for."""
        first = next(iter(self._lines), None)
        if first is None or first.whole or first.prefix is not YOU:
            return
        ends = [line.ended for line in self._lines if line.ended is not None]
        if ends and monotonic() - ends[0] > LATE:
            first.whole, first.text = True, first.text or "..."
            self._write()

    def close(self) -> None:
        """Ends the line in progress."""
        for line in self._lines:
            line.whole = True
            line.text = line.text or "..."
        self._write()
        self._erase()

    def _find(self, name: str, prefix: str) -> _Line | None:
        found = (line for line in self._lines if line.name == name and line.prefix is prefix)
        return next(found, None)

    def _write(self) -> None:
        while self._lines:
            line = self._lines[0]
            text = _clean(line.text)
            new = text[line.shown :]
            if new or line.whole:
                self._erase()
                self._put(self._out, ("" if line.begun else line.prefix) + new)
                line.begun, line.shown, self._partial = True, len(text), True
            if not line.whole:
                return
            self._put(self._out, f" {line.remark}\n" if line.remark else "\n")
            self._partial = False
            self._lines.pop(0)

    def _erase(self) -> None:
        if self._drawn:
            self._put(self._err, ERASE)
            self._drawn = ""

    def _put(self, stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", bool)())


def _clean(text: str) -> str:
    """Words without what a terminal would take for commands."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).lstrip()
