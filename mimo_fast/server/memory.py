"""Memory that large requests leave behind goes back to the system.

glibc keeps what was freed for the next allocation, in places that no larger one fits into: after
some hundred megabytes of messages a process holds as much more, for ever.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mimo_fast.server.logs import log

GROWTH = 64 << 20
"""Bytes beyond what was held after the last time that are given back when nothing runs."""

MUCH = 512 << 20
"""The same while something runs: all threads that allocate may wait for some milliseconds."""

EVERY = 5.0
"""Seconds between two looks."""

STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


@contextmanager
def settled() -> Iterator[None]:
    """Keeps what has been loaded out of the garbage collector's sight for a while.

    A collection of all that torch imports stops every thread for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        # The interpreter's end would take it for leaks.
        gc.unfreeze()


class Trimmer:
    """Gives memory back now and then.

    Args:
        busy: whether the model works.

    Attributes:
        times: How often it has.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy, self._held, self.times = busy, resident(), 0
        # glibc has it, other C libraries need none.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

    async def run(self) -> None:
        """Until it is cancelled."""
        while self._trim is not None:
            await asyncio.sleep(EVERY)
            self.look()

    def look(self) -> None:
        """Gives memory back if there is enough of it."""
        grown = resident() - self._held
        if self._trim is None or grown < (MUCH if self._busy() else GROWTH):
            return
        gc.collect()
        self._trim(0)
        before, self._held = self._held + grown, resident()
        self.times += 1
        log("memory given back", before_mb=before >> 20, after_mb=self._held >> 20)
