"""The compute thread: order, backpressure, cancellation, errors, its end, and what it leaves."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from mimo_fast.errors import ClosedError
from mimo_fast.server.worker import Priority, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


class Held:
    """Keeps the compute thread in a call until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.go.wait(30)


def is_free(worker: Worker) -> bool:
    """Whether no stream is left; one that was read to its end goes a moment later."""
    for _ in range(2000):
        if not worker.streams:
            return True
        time.sleep(0.005)
    return False


async def hold(worker: Worker) -> tuple[Held, asyncio.Task]:
    held = Held()
    task = asyncio.ensure_future(worker.call(held))
    while not held.begun.is_set():
        await asyncio.sleep(0.001)
    return held, task


class Counting:
    """An iterator that says what became of it."""

    def __init__(self, most: int | None = None, item: Callable[[int], object] = lambda i: i):
        self.most, self.item = most, item
        self.made, self.closed, self.threads = 0, 0, set[str]()

    def __iter__(self) -> "Counting":
        return self

    def __next__(self) -> object:
        self.threads.add(threading.current_thread().name)
        if self.made == self.most:
            raise StopIteration
        self.made += 1
        return self.item(self.made - 1)

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed += 1


async def settled(value: Callable[[], object], wanted: object) -> None:
    for _ in range(2000):
        if value() == wanted:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{value()} is not {wanted}")


def test_all_that_touches_an_iterator_happens_in_the_compute_thread(worker: Worker) -> None:
    source = Counting(5)
    started = list[str]()

    def start() -> Counting:
        started.append(threading.current_thread().name)
        return source

    async def main() -> None:
        async with worker.stream(start) as stream:
            assert [item async for item in stream] == [0, 1, 2, 3, 4]
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        assert await worker.call(lambda: threading.current_thread().name) == "mimo-fast compute"

    asyncio.run(main())
    assert started == ["mimo-fast compute"]
    assert source.threads == {"mimo-fast compute"}
    assert source.closed == 1
    assert is_free(worker)


def test_none_is_a_step_without_an_item(worker: Worker) -> None:
    async def main() -> None:
        stream = worker.stream(lambda: iter([None, 1, None, None, 2, None]))
        assert [item async for item in stream] == [1, 2]

    asyncio.run(main())
    assert worker.steps >= 7


def test_an_iterator_rests_while_its_reader_does(worker: Worker) -> None:
    source = Counting()

    async def main() -> None:
        async with worker.stream(lambda: source, ahead=3) as stream:
            await settled(lambda: source.made, 3)
            await asyncio.sleep(0.05)
            assert source.made == 3
            assert [await anext(stream), await anext(stream)] == [0, 1]
            await settled(lambda: source.made, 5)

    asyncio.run(main())
    assert source.closed == 1


def test_streams_take_turns_and_nobody_starves(worker: Worker) -> None:
    order = list[str]()

    def source(name: str, seconds: float) -> Callable[[], Iterator[float]]:
        def items() -> Iterator[float]:
            for _ in range(12):
                order.append(name)
                yield seconds

        return items

    async def main() -> None:
        held, task = await hold(worker)
        listening = {"ahead": 100, "seconds": lambda item: item}
        streams = [worker.stream(source(name, 1.0), **listening) for name in "abcd"]
        batches = [worker.stream(source(name, 0.0), 100, Priority.BATCH) for name in "xy"]
        held.go.set()
        await task
        for stream in [*streams, *batches]:
            assert len([item async for item in stream]) == 12

    asyncio.run(main())
    # Everybody is heard before anybody goes on, then whoever has least left.
    assert sorted(order[:4]) == sorted(order[4:8]) == ["a", "b", "c", "d"]
    # Files wait for listeners, and take turns.
    assert set(order[:48]) == set("abcd")
    assert order[48:52] in (["x", "y", "x", "y"], ["y", "x", "y", "x"])


def test_whoever_runs_dry_comes_before_whoever_has_heard_nothing(worker: Worker) -> None:
    order = list[str]()

    def source(name: str, count: int) -> Iterator[float]:
        for _ in range(count):
            order.append(name)
            yield 0.05

    async def main() -> None:
        listening = {"ahead": 10, "seconds": lambda item: item}
        old = worker.stream(lambda: source("old", 3), ahead=1, seconds=lambda item: item)
        await anext(old)
        await settled(lambda: len(order), 2)
        held, task = await hold(worker)
        new = worker.stream(lambda: source("new", 3), **listening)
        await anext(old)
        held.go.set()
        await task
        assert len([item async for item in new]) == 3
        await old.aclose()

    asyncio.run(main())
    assert order[:3] == ["old", "old", "old"]


def test_calls_come_before_streams_and_give_results_and_errors(worker: Worker) -> None:
    def fails() -> None:
        raise ValueError("so")

    def stops() -> None:
        raise StopIteration

    async def main() -> None:
        endless = worker.stream(lambda: iter(int, 1), ahead=10**9)
        assert await worker.call(divmod, 7, 2) == (3, 1)
        with pytest.raises(ValueError, match="so"):
            await worker.call(fails)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await worker.call(stops)
        await endless.aclose()

    asyncio.run(main())


def test_a_call_that_is_cancelled_before_it_began_does_not_run(worker: Worker) -> None:
    ran = list[int]()

    async def main() -> None:
        held, task = await hold(worker)
        waiting = asyncio.ensure_future(worker.call(ran.append, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        held.go.set()
        await task
        await worker.call(ran.append, 2)

    asyncio.run(main())
    assert ran == [2]


def test_a_call_that_runs_is_finished_though_its_caller_has_gone(worker: Worker) -> None:
    async def main() -> None:
        held, task = await hold(worker)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.go.set()
        assert await worker.call(lambda: 3) == 3

    asyncio.run(main())


def test_a_stream_that_is_closed_before_it_began_never_starts(worker: Worker) -> None:
    started = list[int]()

    async def main() -> None:
        held, task = await hold(worker)
        stream = worker.stream(lambda: iter([started.append(1)]))
        stream.cancel()
        held.go.set()
        await task
        await stream.aclose()
        assert [item async for item in stream] == []

    asyncio.run(main())
    assert not started
    assert is_free(worker)


def test_a_stream_that_runs_is_closed_after_the_step_in_progress(worker: Worker) -> None:
    source = Counting(item=lambda i: time.sleep(0.02) or i)

    async def main() -> None:
        stream = worker.stream(lambda: source, ahead=1000)
        await anext(stream)
        await stream.aclose()
        made = source.made
        await asyncio.sleep(0.1)
        assert source.made == made
        assert source.closed == 1

    asyncio.run(main())


def test_a_reader_that_is_cancelled_frees_its_stream(worker: Worker) -> None:
    source = Counting(item=lambda i: i or None)

    async def read() -> None:
        async with worker.stream(lambda: source) as stream:
            async for _ in stream:
                await asyncio.sleep(3600)

    async def main() -> None:
        task = asyncio.ensure_future(read())
        await settled(lambda: source.made > 1, True)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_free(worker) or source.closed == 1

    asyncio.run(main())
    assert source.closed == 1


@pytest.mark.parametrize("where", ["start", "item", "close", "seconds"])
def test_an_error_reaches_its_reader_and_nobody_else(worker: Worker, where: str) -> None:
    class Source(Counting):
        def __next__(self) -> object:
            if where == "item" and self.made == 2:
                raise ValueError(where)
            return super().__next__()

        def close(self) -> None:
            super().close()
            if where == "close":
                raise ValueError(where)

    source = Source(4)

    def start() -> Source:
        if where == "start":
            raise ValueError(where)
        return source

    def seconds(item: object) -> float:
        if where == "seconds":
            raise ValueError(where)
        return 0.0

    async def main() -> None:
        stream, other = worker.stream(start, seconds=seconds), worker.stream(lambda: Counting(3))
        found = list[object]()

        async def read() -> None:
            async for item in stream:
                found.append(item)

        with pytest.raises(ValueError, match=where):
            await read()
        assert found == {"start": [], "item": [0, 1], "close": [0, 1, 2, 3], "seconds": []}[where]
        # It ends once.
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert [item async for item in other] == [0, 1, 2]

    asyncio.run(main())
    assert is_free(worker)
    assert source.closed == (where != "start")


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    worker, source, ran = Worker(), Counting(), list[int]()

    async def main() -> None:
        stream = worker.stream(lambda: source, ahead=2)
        waiting = worker.stream(lambda: iter(lambda: time.sleep(0.01), 0))
        await settled(lambda: source.made, 2)
        held, task = await hold(worker)
        late = asyncio.ensure_future(worker.call(ran.append, 1))
        await asyncio.sleep(0)
        closing = threading.Thread(target=worker.close)
        closing.start()
        held.go.set()
        await task
        await late
        with pytest.raises(ClosedError):
            [item async for item in stream]
        with pytest.raises(ClosedError):
            await anext(waiting)
        closing.join()
        with pytest.raises(ClosedError):
            await worker.call(ran.append, 2)
        with pytest.raises(ClosedError):
            worker.stream(lambda: source)
        await stream.aclose()
        await waiting.aclose()

    asyncio.run(main())
    worker.close()
    assert ran == [1]
    assert source.closed == 1
    assert is_free(worker)
    assert not worker._thread.is_alive()


def test_a_loop_that_has_ended_holds_nothing(worker: Worker) -> None:
    full, running = Counting(), Counting(item=lambda i: time.sleep(0.01) or i)

    async def leave() -> None:
        worker.stream(lambda: full, ahead=1)
        worker.stream(lambda: running, ahead=10**9)
        await settled(lambda: full.made and running.made > 0, True)

    asyncio.run(leave())

    async def main() -> None:
        assert await worker.call(lambda: 1) == 1
        await settled(lambda: worker.streams, 0)

    asyncio.run(main())
    assert full.closed == running.closed == 1


def test_thousands_of_streams_leave_nothing_behind(worker: Worker) -> None:
    alive = weakref.WeakSet[Counting]()
    threads = threading.active_count()

    async def one(number: int) -> None:
        def start() -> Counting:
            source = Counting(3)
            alive.add(source)
            return source

        async with worker.stream(start, ahead=2) as stream:
            if number % 3 == 0:
                return
            assert await anext(stream) == 0
            if number % 3 == 1:
                assert [item async for item in stream] == [1, 2]

    async def main() -> None:
        for first in range(0, 5000, 250):
            await asyncio.gather(*(one(number) for number in range(first, first + 250)))
        assert threading.active_count() == threads

    asyncio.run(main())
    gc.collect()
    assert is_free(worker)
    assert not alive
    assert not worker._calls
