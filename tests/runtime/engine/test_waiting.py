"""`Waiting`: who is woken, who leads, and what an interrupt leaves behind."""

import threading
import time
from collections import Counter

import pytest

from mimo_fast.runtime.engine import waiting
from mimo_fast.runtime.engine.waiting import Waiting

LONG = 30.0


class Sleeper(threading.Thread):
    """A thread that sleeps until its flag is set, or until it may lead."""

    def __init__(self, place: Waiting, woken: Counter, leads: bool = True) -> None:
        super().__init__(daemon=True)
        self.place, self.woken, self.leads = place, woken, leads
        self.over, self.led, self.left = False, False, threading.Event()

    def run(self) -> None:
        with self.place:
            self.place.sleep(self.until, self.leads)
            self.led = not self.over
            if self.led:
                self.place.lead()
        self.left.set()

    def until(self) -> bool:
        # Asked by itself, it has been woken, or is about to sleep.
        if threading.current_thread() is self:
            self.woken[self] += 1
        return self.over


@pytest.fixture
def place(monkeypatch):
    # Nobody is to look by itself.
    monkeypatch.setattr(waiting, "BACKSTOP", LONG)
    return Waiting()


def sleepers(place, count, **options):
    """So many threads that sleep, beside a step of this one."""
    woken = Counter()
    with place:
        place.lead()
    threads = [Sleeper(place, woken, **options) for _ in range(count)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(place._waiters) < number:
            time.sleep(1e-3)
    with place:
        woken.clear()
    return threads, woken


def end_step(place, **options):
    with place:
        place.leader = None
        place.wake(**options)


def test_only_those_are_woken_whose_wait_is_over(place):
    threads, woken = sleepers(place, 48)
    done = threads[5::12]
    for thread in done:
        thread.over = True
    end_step(place, lead=False)
    for thread in done:
        assert thread.left.wait(LONG)
        assert not thread.led
    with place:
        assert set(woken) == set(done)
        assert len(place._waiters) == 44


def test_one_more_is_woken_to_lead_where_nobody_does(place):
    threads, woken = sleepers(place, 16)
    end_step(place)
    assert threads[0].left.wait(LONG)
    assert threads[0].led
    with place:
        assert place.leader == threads[0].ident
        assert not place.idle
        assert set(woken) == {threads[0]}


def test_who_leads_no_steps_is_not_woken_for_one(place):
    threads, woken = sleepers(place, 4, leads=False)
    end_step(place)
    with place:
        assert place.idle
        assert not woken
    for thread in threads:
        thread.over = True
    with place:
        place.wake()
    assert all(thread.left.wait(LONG) for thread in threads)


def test_no_step_begins_while_somebody_holds_them(place):
    threads, woken = sleepers(place, 3)
    with place:
        place.holders += 1
    end_step(place)
    with place:
        assert not woken
        assert not place.idle
        place.holders -= 1
        place.wake()
    assert threads[0].left.wait(LONG)
    assert threads[0].led


def test_a_thread_that_was_not_woken_looks_by_itself(place, monkeypatch):
    monkeypatch.setattr(waiting, "BACKSTOP", 0.02)
    (thread,), _ = sleepers(place, 1)
    # As after an interrupt between the end of a step and `wake`.
    with place:
        place.leader = None
    assert thread.left.wait(LONG)
    assert thread.led


def test_an_error_leaves_nobody_behind(place):
    class Stop(BaseException):
        pass

    def until():
        raise Stop

    with place, pytest.raises(Stop):
        place.sleep(until)
    asked = []

    def second():
        asked.append(True)
        if len(asked) > 1:
            raise Stop
        return False

    with place, pytest.raises(Stop):
        place.sleep(second)
    assert place._waiters == []
