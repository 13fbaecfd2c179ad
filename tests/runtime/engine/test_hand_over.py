"""How threads hand the engine over: bounded waits under load, and requests that nobody holds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from replies import CAPACITY, GREEDILY, RequestSpec, drawn
from torch import Tensor

from mimo_fast import LM, MimoAudio
from mimo_fast.runtime.engine import policy
from mimo_fast.runtime.engine.engine import Engine, Reply
from mimo_fast.runtime.engine.policy import Bounds
from mimo_fast.runtime.lm.decode import Limits


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step of an engine; steps take longer than a thread waits to run."""
    counted, step = list[int](), Engine._step

    def counting(engine: Engine) -> bool:
        counted.append(1)
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "_step", counting)
    return counted


@contextmanager
def readers(engine: Engine, requests: list[RequestSpec], count: int) -> Iterator[None]:
    """Threads that read endless replies, one after the other, as fast as they can."""
    going, begun, errors = threading.Event(), threading.Barrier(count + 1), list[Exception]()
    going.set()

    def read(number: int) -> None:
        spec = requests[number % len(requests)]
        spec = RequestSpec(spec.ids, number, GREEDILY, Limits(CAPACITY, CAPACITY))
        waited = False
        try:
            while going.is_set():
                for _ in spec.start(engine, ahead=2):
                    if not waited:
                        begun.wait(60)
                    waited = True
                    if not going.is_set():
                        break
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    try:
        yield
    finally:
        going.clear()
        for thread in threads:
            thread.join(60)
    assert not errors


class TestUnderLoad:
    """More streams than slots, each in a thread of its own."""

    @pytest.mark.parametrize("others", [3, 16])
    @pytest.mark.parametrize("action", ["close", "interrupt", "export"])
    def test_ending_a_reply_waits_for_two_steps_at_most(
        self,
        model: MimoAudio,
        requests: list[RequestSpec],
        steps: list[int],
        others: int,
        action: str,
    ) -> None:
        engine = Engine(model.lm, 2, CAPACITY)
        with readers(engine, requests, others):
            for _ in range(3):
                reply = requests[5].start(engine)
                sequence = reply._request.sequence
                next(reply)
                act: dict[str, Callable[[], Any]] = {
                    "close": reply.close,
                    "interrupt": lambda reply=reply: engine.release(reply._request.sequence),
                    "export": lambda sequence=sequence: engine.export(sequence),
                }
                before = len(steps)
                act[action]()
                assert len(steps) - before <= 2

    def test_closing_from_another_thread_does_not_wait_for_a_slot(
        self, model: MimoAudio, requests: list[RequestSpec], steps: list[int]
    ) -> None:
        engine = Engine(model.lm, 1, CAPACITY)
        running = requests[5].start(engine, ahead=None)
        next(running)
        waiting, got = requests[4].start(engine, ahead=None), list[Any]()
        reader = threading.Thread(target=lambda: got.extend(waiting))
        with readers(engine, requests, 4):
            reader.start()
            before = len(steps)
            waiting.close()
            reader.join(60)
            assert len(steps) - before <= 4
        assert got == []

    @pytest.mark.parametrize("others", [3, 16])
    def test_a_new_request_is_admitted_after_two_groups(
        self, model: MimoAudio, requests: list[RequestSpec], steps: list[int], others: int
    ) -> None:
        engine = Engine(model.lm, 2, CAPACITY)
        with readers(engine, requests, others):
            for _ in range(3):
                before = len(steps)
                reply = requests[5].start(engine)
                reply.prefill()
                # Two groups, a step that was in progress, the prompt itself, and as many prompts of
                # readers that start anew meanwhile.
                assert len(steps) - before <= 4 + others
                reply.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_rows_that_take_turns_draw_what_they_draw_alone(
    model: MimoAudio,
    requests: list[RequestSpec],
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
) -> None:
    monkeypatch.setattr(policy, "SLICE", 3)
    engine, evicted, evict = Engine(model.lm, slots, CAPACITY), list[int](), Engine._evict

    def counting(engine: Engine, *arguments: Any) -> None:
        evicted.append(1)
        evict(engine, *arguments)

    monkeypatch.setattr(Engine, "_evict", counting)
    replies = [request.start(engine, ahead=100) for request in requests]
    got: list[list[Any]] = [[] for _ in requests]
    threads = [
        threading.Thread(target=lambda row=row, reply=reply: got[row].extend(reply))
        for row, reply in enumerate(replies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [drawn(groups) for groups in got] == alone
    assert len(evicted) > len(requests)


def test_a_batch_waits_for_those_who_listen(
    model: MimoAudio, requests: list[RequestSpec], alone: list[Any]
) -> None:
    engine = Engine(model.lm, 1, CAPACITY)
    listener = requests[5].start(engine)
    batch = requests[4].start(engine, ahead=None)
    first = next(listener)
    assert batch._request.sequence.slot is None
    assert drawn([first, *listener]) == alone[5]
    assert drawn(list(batch)) == alone[4]


class TestNobodyHolds:
    def test_streams_that_were_dropped_leave_nothing(
        self, model: MimoAudio, requests: list[RequestSpec], alone: list[Any]
    ) -> None:
        """One thread drops streams in the middle of a group of the other's, some by errors."""
        engine, errors = Engine(model.lm, 3, CAPACITY), list[Exception]()

        def drop() -> None:
            try:
                for number in range(120):
                    try:
                        for _ in requests[number % 6].start(engine):
                            if number % 3 == 2:
                                raise ConnectionError
                            break
                    except ConnectionError:
                        pass
            except Exception as error:
                errors.append(error)

        dropper = threading.Thread(target=drop)
        dropper.start()
        while dropper.is_alive():
            assert drawn(list(requests[5].start(engine))) == alone[5]
        dropper.join()
        assert not errors
        assert drawn(list(requests[3].start(engine))) == alone[3]
        assert engine._requests == []

    def test_a_group_that_is_delivered_late_does_not_revive_a_request(
        self, engine: Engine, requests: list[RequestSpec], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reply goes away while its group is computed."""
        replies = [requests[5].start(engine)]
        replies[0].prefill()
        request, step = replies[0]._request, LM.sample_text

        def dropping(*arguments: Any) -> Tensor:
            replies.clear()
            return step(*arguments)

        monkeypatch.setattr(LM, "sample_text", dropping)
        other = requests[4].start(engine)
        next(other)
        next(other)
        assert replies == []
        assert request.done
        assert request not in engine._requests

    def test_streams_that_nobody_reads_give_up_their_places(
        self, model: MimoAudio, requests: list[RequestSpec], alone: list[Any]
    ) -> None:
        engine = Engine(model.lm, 2, CAPACITY, bounds=Bounds(queue=3))
        idle = list[Reply]()
        for _ in range(12):
            idle.append(requests[5].start(engine))
            next(idle[-1])
        assert drawn(list(requests[3].start(engine))) == alone[3]
        for reply in idle:
            assert drawn([*reply]) == alone[5][1:]

    def test_a_sequence_whose_reply_was_dropped_goes_on(
        self, engine: Engine, requests: list[RequestSpec], alone: list[Any]
    ) -> None:
        """What was decoded ahead is not part of it, and its draws are those of the groups taken."""
        spec = requests[5]
        sequence = engine.sequence(spec.seed)
        sequence.add(spec.ids)
        reply = engine.start(sequence, spec.limits, spec.samplers)
        got = [next(reply), next(reply)]
        other = requests[4].start(engine)
        next(other)
        next(other)
        del reply
        engine.release(sequence)
        assert sequence.cached <= sequence.groups
        assert sequence.draws == 2
        limits = Limits(spec.limits.max_new - 2, 0, spec.limits.stop_ids)
        got += engine.start(sequence, limits, spec.samplers)
        assert [group[:2] for group in drawn(got)] == [group[:2] for group in alone[5]]


@pytest.mark.parametrize(
    ("limit", "capacity", "reason"),
    [(5, CAPACITY, "length"), (500, CAPACITY, "context"), (44, CAPACITY, "length")],
)
def test_a_reply_says_why_it_ended(
    model: MimoAudio, requests: list[RequestSpec], limit: int, capacity: int, reason: str
) -> None:
    spec = requests[4]
    assert spec.ids.shape[1] // 4 == 36
    spec = RequestSpec(spec.ids, 0, GREEDILY, Limits(limit))
    reply = spec.start(Engine(model.lm, 1, capacity))
    assert reply.finish_reason is None
    assert len(list(reply)) == min(limit, capacity - 36)
    assert reply.finish_reason == reason


def test_a_reply_that_stops_or_is_closed_says_so(
    engine: Engine, requests: list[RequestSpec], alone: list[Any]
) -> None:
    token = alone[4][2][0]
    spec = RequestSpec(requests[4].ids, 104, GREEDILY, Limits(9, 0, frozenset({token})))
    reply = spec.start(engine)
    assert len(list(reply)) == [group[0] for group in alone[4]].index(token) + 1
    assert reply.finish_reason == "stop"
    hooked = requests[5].start(engine, stop_hook=lambda text, codes: True)
    list(hooked)
    assert hooked.finish_reason == "stop"
    closed = requests[5].start(engine)
    next(closed)
    closed.close()
    assert list(closed) == []
    assert closed.finish_reason == "cancelled"
