"""The thread that computes: a server's event loop only waits for it.

    event loop:  await worker.call(f)          async for item in worker.stream(start)
                        │                                     ▲ at most `ahead` items wait
    compute thread:   calls, one by one, before the next step of the most urgent stream

One thread is enough: a step of one stream decodes a group of every row that wants one (see
`runtime/engine/engine.py`), and a request that waits costs nothing.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from time import perf_counter
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from mimo_fast.errors import ClosedError
from mimo_fast.runtime.engine.policy import Demand, Priority

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Meter(Protocol):
    """Told in the compute thread what becomes of one stream of audio; see `server/metrics.py`."""

    def heard(self, seconds: float, hungry: bool) -> None:
        """An item with audio was made; `hungry`: its reader had none left to read."""

    def ended(self) -> None:
        """Nothing follows."""


class Stream(AsyncIterator[Item], Generic[Item]):
    """Items of an iterator that the compute thread runs; see `Worker.stream`.

    Leaving it without reading to its end needs `aclose` or `cancel`, which free what the iterator
    holds after the step in progress. Without it they are freed when the event loop is closed.
    """

    def __init__(
        self,
        worker: Worker,
        start: Callable[[], Iterator[Item | None]],
        ahead: int,
        priority: Priority,
        seconds: Callable[[Item], float],
        meter: Meter | None = None,
    ) -> None:
        self._meter = meter
        self._worker, self._start, self._ahead = worker, start, ahead
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._items = deque[Item]()
        self._demand = Demand(priority, perf_counter())
        self._iterator: Iterator[Item | None] | None = None
        self._error: BaseException | None = None
        self._ended = self._closing = False
        self._news = asyncio.Event()
        self._closed = asyncio.Event()

    async def __anext__(self) -> Item:
        while not self._items:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        item = self._items.popleft()
        self._worker._wake()
        return item

    def cancel(self) -> None:
        """Ends the stream after the step in progress, without waiting for that."""
        self._closing = True
        self._items.clear()
        self._worker._wake()

    async def aclose(self) -> None:
        """Ends the stream; returns when its iterator has been closed."""
        # What must happen comes before the first wait: a task that is cancelled may not get on.
        self.cancel()
        await self._closed.wait()

    async def __aenter__(self) -> Stream[Item]:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    @property
    def _wants_work(self) -> bool:
        if self._closing or self._loop.is_closed():
            return True
        return not self._ended and len(self._items) < self._ahead

    @property
    def _urgency(self) -> tuple[int, float]:
        """The least is next, see `policy.urgency`; what is to be closed comes first."""
        if self._closing:
            return 0, -math.inf
        return self._demand.urgency(perf_counter())

    def _step(self) -> bool:
        """Computes an item, in the compute thread -> whether the stream is over."""
        if self._closing or self._loop.is_closed():
            self._finish(None)
            return True
        try:
            if self._iterator is None:
                self._iterator = self._start()
            item = next(self._iterator)
            heard = 0.0 if item is None else self._seconds(item)
        except StopIteration:
            self._finish(None)
            return True
        except BaseException as error:
            self._finish(error)
            return True
        if heard > 0:
            self._demand.hears(heard, perf_counter())
            if self._meter is not None:
                self._meter.heard(heard, not self._items)
        self._demand.served = perf_counter()
        if item is None:
            # Others have their turn.
            self._demand.arrived = self._demand.served
        if item is not None:
            self._items.append(item)
            self._tell(self._news)
        return False

    def _finish(self, error: BaseException | None) -> None:
        iterator, self._iterator = self._iterator, None
        if self._meter is not None:
            self._meter.ended()
        # What it was made of, too, may hold a recording.
        self._start = _nothing
        try:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        except BaseException as failed:
            error = error or failed
        self._error, self._ended = error, True
        self._tell(self._news)
        self._tell(self._closed)

    def _tell(self, event: asyncio.Event) -> None:
        # A loop that has ended waits for nothing.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(event.set)


def _nothing() -> Iterator[Any]:
    return iter(())


class Worker:
    """One compute thread of a server.

    Attributes:
        steps: Number of calls and items that it has computed.
        meter: Makes what each stream for a listener is measured with; None measures nothing.
    """

    def __init__(self) -> None:
        self.meter: Callable[[], Meter] | None = None
        self._changed = threading.Condition()
        self._calls = deque[Callable[[], None]]()
        self._streams = list[Stream[Any]]()
        self._stopping = False
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="mimo-fast compute", daemon=True)
        self._thread.start()

    @property
    def streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    async def call(
        self,
        function: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Result of a function that runs in the compute thread, between two steps.

        A call that was cancelled before it began does not run; one that runs is finished.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()

        def settle(found: Result | None, error: BaseException | None) -> None:
            if result.cancelled():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(found)  # type: ignore[arg-type]

        def run() -> None:
            if result.cancelled():
                return
            found, failed = None, None
            try:
                found = function(*arguments, **named)
            except BaseException as error:
                failed = error
                if isinstance(error, StopIteration):
                    failed = RuntimeError("the call raised StopIteration")
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, found, failed)

        with self._changed:
            self._check()
            self._calls.append(run)
            self._changed.notify()
        return await result

    def stream(
        self,
        start: Callable[[], Iterator[Item | None]],
        ahead: int = 8,
        priority: Priority = Priority.LISTENER,
        seconds: Callable[[Item], float] = lambda _: 0.0,
    ) -> Stream[Item]:
        """The items of `start()`, which is called and read in the compute thread.

        A None is no item: it ends a step, so that others have their turn.

        Args:
            ahead: items that may wait for their reader; the iterator rests meanwhile.
            seconds: audio that an item gives a listener, which says how soon the next is due.
        """
        measured = self.meter if priority is Priority.LISTENER else None
        meter = None if measured is None else measured()
        found = Stream(self, start, ahead, priority, seconds, meter)
        with self._changed:
            self._check()
            self._streams.append(found)
            self._changed.notify()
        return found

    def close(self) -> None:
        """Ends the thread after the step in progress; calls that wait run, streams end.

        Whoever reads a stream gets a ClosedError, and so does every later call and stream.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _check(self) -> None:
        if self._stopping:
            raise ClosedError("the server is stopping")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        work: Stream[Any] | Callable[[], None] | None = None
        while True:
            with self._changed:
                while not self._stopping and (work := self._next_work()) is None:
                    self._changed.wait()
                if self._stopping:
                    break
            self.steps += 1
            if isinstance(work, Stream):
                if work._step():
                    with self._changed:
                        self._streams.remove(work)
            elif work is not None:
                work()
            # What it was is freed before the next wait.
            work = None
        while self._calls:
            self._calls.popleft()()
        for stream in [*self._streams]:
            stream._finish(ClosedError("the server is stopping"))
        self._streams.clear()

    def _next_work(self) -> Stream[Any] | Callable[[], None] | None:
        if self._calls:
            return self._calls.popleft()
        waiting = [stream for stream in self._streams if stream._wants_work]
        return min(waiting, key=lambda stream: stream._urgency, default=None)
