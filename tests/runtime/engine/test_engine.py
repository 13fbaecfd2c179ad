"""The engine: threads share steps, streams pause, slots change hands."""

import torch
from helpers import in_threads, watch
from replies import CAPACITY, drawn

from mimo_fast import LM
from mimo_fast.generation import group_ids
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import Group


def test_threads_share_their_steps(model, engine, requests, alone, monkeypatch):
    rows = list[int]()
    watch(monkeypatch, LM, "step", lambda _lm, _state, slots: rows.append(len(slots)))
    replies = [request.start(engine) for request in requests[:3]]
    assert in_threads(lambda i: drawn(list(replies[i])), 3) == alone[:3]
    assert max(rows) == 3
    assert len(rows) < sum(rows)


class TestPausing:
    def test_a_row_runs_ahead_of_its_consumer_by_so_much(self, engine, requests):
        idle, busy = requests[5].start(engine, ahead=2), requests[4].start(engine)
        idle.prefill()
        list(busy)
        assert idle._request.row.produced == 2

    def test_a_long_prompt_comes_in_chunks_between_the_groups_of_others(
        self, model, engine, requests, alone, monkeypatch
    ):
        monkeypatch.setattr("mimo_fast.runtime.lm.model.PREFILL_CHUNK", 8)
        running = requests[5].start(engine)
        got = [next(running)]
        long = requests[4].start(engine)
        chunks = -(-long._request.sequence.groups // 8)
        assert chunks > 2
        for _ in range(chunks - 1):
            got.append(next(running))
            assert long._request.row is None
        got.append(next(running))
        assert long._request.row is not None
        assert drawn([*got, *running]) == alone[5]
        assert drawn(list(long)) == alone[4]


def test_conversations_that_nobody_holds_leave_their_slots(engine, requests):
    for _ in range(8):
        next(requests[5].start(engine))
    assert len([owner for owner in engine.slots.owners if owner and owner()]) <= 1
    list(requests[3].start(engine))
    assert not engine._requests


def test_a_parked_conversation_goes_on_as_if_it_had_stayed(model, requests, alone):
    """One slot for three streams: each step moves two of them out and one back in."""
    engine = Engine(model.lm, 1, CAPACITY)
    replies = [requests[i].start(engine, ahead=1) for i in (3, 4, 5)]
    got: list[list[Group]] = [[], [], []]
    for _ in range(6):
        for row, reply in enumerate(replies):
            got[row].append(next(reply))
    for row, reply in enumerate(replies):
        got[row] += list(reply)
    assert [drawn(groups) for groups in got] == [alone[i] for i in (3, 4, 5)]
    sequence = replies[0]._request.sequence
    said = [group_ids(group.text, group.codes) for group in got[0]]
    assert torch.equal(sequence.ids, torch.cat([requests[3].ids, *said], dim=1))
