"""`Waiting`: threads that sleep until what they wait for has come about; one of them computes it.

To wake all of them after each step would be simpler, and cost a tenth of the interpreter's time of
48 replies: each would take the lock in turn, only to find that it still waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

BACKSTOP = 1.0
"""Seconds after which a thread looks by itself: an interrupt may have come before it was woken."""


@dataclass(eq=False)
class _Waiter:
    """A thread that sleeps.

    Attributes:
        until: What it waits for.
        leads: Whether it may lead a step where nobody else does.
    """

    until: Callable[[], bool]
    leads: bool
    woken: threading.Condition


class Waiting:
    """The lock of an engine, and who sleeps under it. A thread that holds it may take it again.

    Attributes:
        leader: The thread whose step is in progress; None between steps.
        holders: Threads for which no step may begin.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiters: list[_Waiter] = []
        self.leader: int | None = None
        self.holders = 0

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    @property
    def idle(self) -> bool:
        """Whether a step may begin."""
        return self.leader is None and not self.holders

    @property
    def leads(self) -> bool:
        """Whether the step in progress is this thread's."""
        return self.leader == threading.get_ident()

    def lead(self) -> None:
        """Begins a step of this thread."""
        self.leader = threading.get_ident()

    def sleep(self, until: Callable[[], bool], leads: bool = False) -> None:
        """Returns when `until` holds or, for one who `leads`, a step may begin; holding the lock.

        until: called under the lock, by any thread.
        """
        if until() or (leads and self.idle):
            return
        waiter = _Waiter(until, leads, threading.Condition(self._lock))
        self._waiters.append(waiter)
        try:
            while not until() and not (leads and self.idle):
                waiter.woken.wait(BACKSTOP)
        finally:
            self._waiters.remove(waiter)

    def wake(self, lead: bool = True) -> None:
        """Wakes those whose wait is over.

        lead: whether, where a step may begin, one more is woken to lead it.
        """
        lead = lead and self.idle
        for waiter in self._waiters:
            if waiter.until():
                waiter.woken.notify()
            elif lead and waiter.leads:
                lead = False
                waiter.woken.notify()
