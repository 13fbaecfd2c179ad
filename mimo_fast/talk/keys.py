"""Keys of a terminal as they are pressed; the terminal is as before afterwards."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PRESSES, ENDS = " \n", "qQ\x04"
"""Space and return; q and Ctrl-D."""


@contextmanager
def keys(press: Callable[[], None], end: Callable[[], None], lines: bool) -> Iterator[None]:
    """Calls `press` and `end` in the event loop when keys of theirs are pressed.

    Args:
        lines: each line counts as a key where standard input is no terminal, its end as `end`.
    """
    loop = asyncio.get_running_loop()
    if not sys.stdin.isatty():
        if lines:
            threading.Thread(target=_read_lines, args=(loop, press, end), daemon=True).start()
        yield
        return
    try:
        import termios
        import tty
    except ImportError:
        # Not on Windows: lines it is.
        threading.Thread(target=_read_lines, args=(loop, press, end), daemon=True).start()
        yield
        return
    number = sys.stdin.fileno()

    def read() -> None:
        for key in os.read(number, 64).decode(errors="ignore") or "\x04":
            if key in PRESSES:
                press()
            elif key in ENDS:
                end()

    before = termios.tcgetattr(number)
    try:
        # Ctrl-C stays what it is.
        tty.setcbreak(number)
        loop.add_reader(number, read)
        yield
    finally:
        loop.remove_reader(number)
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _read_lines(
    loop: asyncio.AbstractEventLoop, press: Callable[[], None], end: Callable[[], None]
) -> None:
    # The talk may be over.
    with suppress(RuntimeError, ValueError, OSError):
        for _ in sys.stdin:
            loop.call_soon_threadsafe(press)
        loop.call_soon_threadsafe(end)
