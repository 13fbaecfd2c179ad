"""Work of several threads computed together, by whichever comes first."""

import threading
import time
from collections.abc import Callable

import pytest
from helpers import in_threads

from mimo_fast.runtime.gathering import Gathering


class Computed:
    """Doubles numbers; its first call lasts until it is let go."""

    def __init__(self) -> None:
        self.calls = list[list[int]]()
        self.began, self.goes = threading.Event(), threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.calls.append(items)
        self.began.set()
        if len(self.calls) == 1:
            assert self.goes.wait(30)
        return [2 * item for item in items]


def gathered(
    gathering: Gathering[int, int], count: int, compute: Callable[[list[int]], list[int]]
) -> list[threading.Thread]:
    """Threads that bring 10, 20, ... with another number each, once they wait."""
    threads = [
        threading.Thread(target=brings, args=(gathering, 10 * i, compute), daemon=True)
        for i in range(1, count + 1)
    ]
    for thread in threads:
        thread.start()
    while len(gathering._waiting) < count:
        time.sleep(0.001)
    return threads


results = dict[int, list[int] | BaseException]()


def brings(gathering: Gathering[int, int], number: int, compute: Callable) -> None:
    try:
        results[number] = gathering.run([number, number + 1], compute)
    except BaseException as error:
        results[number] = error


def test_one_thread_waits_for_nobody():
    gathering, compute = Gathering[int, int](), Computed()
    compute.goes.set()
    for number in range(3):
        assert gathering.run([number], compute) == [2 * number]
    assert gathering.run([], compute) == []
    assert compute.calls == [[0], [1], [2], []]


def test_what_comes_meanwhile_is_one_call():
    gathering, compute = Gathering[int, int](), Computed()
    first = threading.Thread(target=brings, args=(gathering, 0, compute), daemon=True)
    first.start()
    assert compute.began.wait(30)
    others = gathered(gathering, 5, compute)
    compute.goes.set()
    for thread in (first, *others):
        thread.join(30)
    assert len(compute.calls) == 2
    assert compute.calls[0] == [0, 1]
    assert sorted(compute.calls[1]) == sorted([10 * i + j for i in range(1, 6) for j in range(2)])
    for number in range(0, 60, 10):
        assert results[number] == [2 * number, 2 * number + 2]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_is_that_of_all_and_an_interrupt_of_one(kind):
    gathering, compute = Gathering[int, int](), Computed()
    first = threading.Thread(target=brings, args=(gathering, 0, compute), daemon=True)
    first.start()
    assert compute.began.wait(30)
    raised = list[int]()

    def fails_once(items: list[int]) -> list[int]:
        if not raised:
            raised.append(len(items))
            raise kind("no")
        return [2 * item for item in items]

    others = gathered(gathering, 3, fails_once)
    compute.goes.set()
    for thread in (first, *others):
        thread.join(30)
    found = [results[number] for number in (10, 20, 30)]
    failed = [each for each in found if isinstance(each, BaseException)]
    assert raised == [6]
    assert [type(each) for each in failed] == [kind] * (3 if kind is ValueError else 1)
    assert not gathering._waiting
    for number, each in zip((10, 20, 30), found, strict=True):
        assert isinstance(each, kind) or each == [2 * number, 2 * number + 2]


def test_many_threads():
    gathering = Gathering[int, int]()
    calls = list[int]()

    def compute(items: list[int]) -> list[int]:
        calls.append(len(items))
        time.sleep(0.001)
        return [item + 1 for item in items]

    def work(i: int) -> bool:
        return all(
            gathering.run([*range(n, n + i)], compute) == [*range(n + 1, n + i + 1)]
            for n in range(20)
        )

    assert all(in_threads(work, 8))
    assert sum(calls) == 20 * sum(range(8))
