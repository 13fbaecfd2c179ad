"""Work of several threads computed together by whichever of them comes first.

A thread that finds nobody computing takes all that waits and computes it in one call; others that
come meanwhile wait for that call, and the first of them takes what has gathered. So nobody waits
for work that has not come yet, and for one call of others at most before its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Ticket(Generic[Item, Result]):
    """What one thread has brought, and what became of it."""

    items: Sequence[Item]
    results: list[Result] = field(default_factory=list)
    error: Exception | None = None
    done: bool = False


class Gathering(Generic[Item, Result]):
    """`run` of several threads as few calls."""

    def __init__(self) -> None:
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._waiting = list[_Ticket[Item, Result]]()

    def run(
        self, items: Sequence[Item], compute: Callable[[list[Item]], list[Result]]
    ) -> list[Result]:
        """The result of each item, in their order.

        Args:
            compute: the results of all items that have gathered; the same for all threads. What it
                raises is raised in each of their threads.
        """
        ticket = _Ticket[Item, Result](items)
        with self._lock:
            self._waiting.append(ticket)
        try:
            with self._turn:
                if not ticket.done:
                    self._compute(compute)
        finally:
            with self._lock:
                if ticket in self._waiting:
                    # This thread was interrupted.
                    self._waiting.remove(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.results

    def _compute(self, compute: Callable[[list[Item]], list[Result]]) -> None:
        """Computes what waits, the caller's own among it."""
        with self._lock:
            taken, self._waiting = self._waiting, []
        try:
            results = iter(compute([item for ticket in taken for item in ticket.items]))
            for ticket in taken:
                ticket.results = [next(results) for _ in ticket.items]
                ticket.done = True
        except Exception as error:
            for ticket in taken:
                ticket.error, ticket.done = error, True
        finally:
            # An interrupt is this thread's own: the others compute theirs themselves.
            with self._lock:
                self._waiting[:0] = [ticket for ticket in taken if not ticket.done]
