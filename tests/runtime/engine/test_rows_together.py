"""What a step launches does not grow with its rows; prompts and prefixes are computed together."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from helpers import raising, watch
from replies import CAPACITY, GREEDILY, RequestSpec, drawn

from mimo_fast import LM
from mimo_fast.errors import BusyError
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.policy import Bounds, Priority
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.voicing import ReplyReader, Voicing
from mimo_fast.runtime.lm.decode import Limits
from mimo_fast.runtime.lm.prefixes import SHORTEST


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """What each step of an engine called, by name, and "rows": codec streams that were pushed."""
    steps = list[Counter[str]]()
    watch(monkeypatch, Engine, "_step", lambda _: steps.append(Counter()))

    def count(name: str, *_: Any) -> None:
        if steps:
            steps[-1][name] += 1

    for owner, method in ((LM, "step"), (LM, "sample_patch"), (LM, "sample_text")):
        watch(monkeypatch, owner, method, partial(count, method))
    watch(monkeypatch, LM, "prefill_together", partial(count, "prefill"))

    def pushed(_codec: Codec, pushes: Any) -> None:
        count("advance")
        steps[-1]["rows"] += len(pushes)

    watch(monkeypatch, Codec, "advance", pushed)
    return steps


def timeless(model: Any, slots: int, **options: Any) -> Engine:
    """An engine to which no step takes time: all rows that can be computed are."""
    engine = Engine(model.lm, slots, CAPACITY, **options)
    engine.clock = lambda: 0.0
    return engine


def spoken(engine: Engine, model: Any, spec: RequestSpec, **options: Any) -> Reply:
    reply = spec.start(engine, **options)
    reply.voiced_by(Voicing(ReplyReader(model.tokenizer, True), model.codec))
    return reply


@pytest.mark.parametrize("rows", [1, 64])
def test_a_step_of_any_rows_is_one_call_of_everything(model, requests, work, rows):
    engine = timeless(model, rows)
    replies = [
        spoken(engine, model, RequestSpec(requests[5].ids, i, GREEDILY, Limits(14, 14)))
        for i in range(rows)
    ]
    for _ in range(14):
        assert all(reply.take() is not None for reply in replies)
    # One prompt is computed for all who have the same, but for its last group.
    assert sum(step["prefill"] for step in work) == (1 if rows == 1 else 2)
    assert len(work) == 14 + (1 if rows == 1 else 2)
    assert max(step["rows"] for step in work) == rows
    for name in ("step", "sample_patch", "advance"):
        assert max(step[name] for step in work) == 1, name
    # Rows at the end of their prompts have nothing to feed.
    assert max(step["sample_text"] for step in work) <= 2


def test_what_prompts_share_is_computed_once_for_all_who_wait(model, requests, alone, work):
    """Four prompts with one beginning, as a system prompt or a voice is, and ends of their own."""
    shared, size = requests[5].ids, 4
    assert shared.shape[1] // size > 2 * SHORTEST
    specs = [
        RequestSpec(
            torch.cat((shared, requests[i].ids[:, : 4 * size]), dim=1), i, GREEDILY, Limits(4, 4)
        )
        for i in range(4)
    ]
    want = [drawn(list(spec.start(Engine(model.lm, 1, CAPACITY)))) for spec in specs]
    engine = timeless(model, 4)
    work.clear()
    replies = [spec.start(engine) for spec in specs]
    assert [drawn(list(reply)) for reply in replies] == want
    assert sum(step["prefill"] for step in work) == 2
    tree = engine.steps.prefixes
    common = shared.shape[1] // size
    assert tree.hits == 3
    assert tree.reused >= 3 * common
    prefilled = [reply.sequence.prefilled for reply in replies]
    assert sorted(prefilled)[-1] == common + 4
    assert sum(prefilled) == 4 * (common + 4) - tree.reused
    # And whoever comes later computes as little.
    late = specs[2].start(engine)
    assert drawn(list(late)) == want[2]
    assert late.sequence.prefilled <= 4


def test_whoever_leads_may_leave(model, requests):
    """The shared beginning is then computed by the next one."""
    ids = requests[5].ids
    specs = [RequestSpec(ids, i, GREEDILY, Limits(3, 3)) for i in range(3)]
    engine = timeless(model, 3)
    replies = [spec.start(engine) for spec in specs]
    replies[0].close()
    want = drawn(list(specs[1].start(Engine(model.lm, 1, CAPACITY))))
    assert drawn(list(replies[1])) == drawn(list(replies[2])) == want
    assert not engine._requests


def test_bits_do_not_depend_on_where_a_prefix_came_from(model, requests):
    """Hidden state and keys after a prompt: computed at once, in chunks, and from the tree."""
    spec = RequestSpec(requests[4].ids, 1, GREEDILY, Limits(2, 2))
    found = []
    for chunk, runs in ((512, 1), (5, 1), (512, 3)):
        engine = timeless(model, 3)
        engine.lm = engine.steps.lm
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mimo_fast.runtime.lm.model.PREFILL_CHUNK", chunk)
            for _ in range(runs):
                reply = spec.start(engine)
                reply.prefill()
        slot, length = reply.sequence.slot, reply.sequence.cached
        parts = [part[:, slot, :, :length].clone() for part in engine.state.cache.parts]
        found.append([*parts, engine.state.hidden[slot].clone()])
        reused = engine.steps.prefixes.reused
    assert reused > 0
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_paused_consumer_costs_nothing(model, requests, work):
    engine = timeless(model, 2)
    limits = Limits(20, 20)
    paused, busy = (
        spoken(engine, model, RequestSpec(requests[i].ids, i, GREEDILY, limits), ahead=2)
        for i in (3, 5)
    )
    while busy.take() is not None:
        pass
    # Two groups ahead, and then its row was not computed.
    assert paused._request.row.produced == 2
    others = [requests[4].start(engine) for _ in range(2)]
    for other in others:
        assert list(other)
    # Its slot was needed, and it goes on as if nothing had been.
    assert engine.slots.evictions > 0
    rest = 0
    while paused.take() is not None:
        rest += 1
    assert rest == 20


def test_an_error_of_one_codec_stream_is_that_reply_s_own(model, requests, monkeypatch):
    engine, inner = timeless(model, 3), Codec.advance
    spec = RequestSpec(requests[5].ids, 1, GREEDILY, Limits(14, 14))
    replies = [spoken(engine, model, spec) for _ in range(3)]

    def failing(codec: Codec, pushes: Any) -> Any:
        results = inner(codec, pushes)
        if len(results) == 3 and len(replies[1]._request.ready) == 0 and replies[1].taken == 3:
            results[1] = RuntimeError("no such codes")
        return results

    monkeypatch.setattr(Codec, "advance", failing)
    taken = [0, 0, 0]
    for _ in range(14):
        for i, reply in enumerate(replies):
            if i == 1 and taken[1] == 3:
                continue
            assert reply.take() is not None
            taken[i] += 1
    with pytest.raises(RuntimeError, match="no such codes"):
        replies[1].take()
    assert taken == [14, 3, 14]


def test_an_interrupt_in_the_codec_loses_no_sample(model, requests, monkeypatch):
    """Ctrl-C in the middle of the call: the streams in it are fed again."""
    spec = RequestSpec(requests[5].ids, 1, GREEDILY, Limits(30, 30))

    def heard(breaks: int | None) -> list[list[float]]:
        engine = timeless(model, 2)
        replies, parts = [spoken(engine, model, spec) for _ in range(2)], [[], []]
        calls = Counter[str]()

        def broken(*_: Any) -> None:
            calls["advance"] += 1
            if calls["advance"] == breaks:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            watch(patch, Codec, "advance", after=broken)
            for _ in range(30):
                for reply, part in zip(replies, parts, strict=True):
                    try:
                        delivery = reply.take()
                    except KeyboardInterrupt:
                        delivery = reply.take()
                    part += delivery.audio.tolist()
        return parts

    whole = heard(None)
    assert len(whole[0]) > 0
    for breaks in (1, 12, 20):
        assert heard(breaks) == whole


def test_an_error_of_the_whole_call_is_tried_row_by_row(model, requests, monkeypatch):
    spec = RequestSpec(requests[5].ids, 1, GREEDILY, Limits(20, 20))

    def heard(fails: bool) -> list[list[float]]:
        engine = timeless(model, 2)
        replies, parts, inner = (
            [spoken(engine, model, spec) for _ in range(2)],
            [[], []],
            Codec.advance,
        )

        def together(codec: Codec, pushes: Any) -> Any:
            found = inner(codec, pushes)
            if fails and len(pushes) > 1:
                raise RuntimeError("out of memory")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Codec, "advance", together)
            for _ in range(20):
                for reply, part in zip(replies, parts, strict=True):
                    part += reply.take().audio.tolist()
        return parts

    assert heard(True) == heard(False)


def test_a_full_engine_refuses_rather_than_stutters(model, requests):
    engine = timeless(model, 4, bounds=Bounds(load=0.5))
    first = requests[5].start(engine)
    next(first)
    engine.steps.cost.row = 0.05
    with pytest.raises(BusyError, match="1 listeners are served, and one more would need 62%"):
        requests[4].start(engine)
    # A batch waits instead, and nobody is refused who follows in a stream that was let in.
    batch = requests[4].start(engine, priority=Priority.BATCH)
    requests[3].start(engine, bounded=False).close()
    assert list(batch)
    first.close()
    requests[4].start(engine).close()


def test_host_memory_bounds_those_who_wait(model, requests):
    engine = timeless(model, 1)
    running = requests[5].start(engine, ahead=None)
    next(running)
    waiting = requests[4].start(engine)
    position = engine.state.cache.nbytes // CAPACITY
    engine.bounds = Bounds(parked=40 * position)
    with pytest.raises(
        BusyError, match=r"1 replies wait for a slot, and another .* of host memory"
    ):
        requests[3].start(engine)
    waiting.close()


def test_text_that_cannot_be_read_ends_its_own_reply(model, requests, monkeypatch):
    engine = timeless(model, 2)
    spec = RequestSpec(requests[5].ids, 1, GREEDILY, Limits(5, 5))
    good, bad = (spoken(engine, model, spec) for _ in range(2))
    bad._request.voicing._reader.copy = raising(RuntimeError, "no tokenizer")
    assert sum(1 for _ in good) == 5
    with pytest.raises(RuntimeError, match="no tokenizer"):
        bad.take()
