"""Launching the next group before waiting for the last one's audio: order, limits, failures."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from dialogues import own_dialogue, same
from helpers import in_threads, raising, watch
from replies import CAPACITY, break_steps, drawn
from torch import Tensor

from mimo_fast import LM, Chunk, MimoAudio
from mimo_fast.bench.schedule import ScheduledLM
from mimo_fast.runtime.codec.stream import LOOKAHEAD, CodecStream
from mimo_fast.runtime.engine import stream as streams
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm import decode

OPTIONS: dict[str, Any] = {"seed": 2, "max_new_tokens": 48, "min_new_tokens": 48}
TEXT = "The quick brown fox."


class Device:
    """Logs launches and waits of the host; a copy shows its content to who has waited for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self._copies(monkeypatch, streams, "samples")
        self._copies(monkeypatch, decode, "tokens")
        for owner, method, name in (
            (LM, "step", "step"),
            (LM, "sample_patch", "patch"),
            (CodecStream, "push", "codec"),
            (CodecStream, "finish", "codec"),
        ):
            watch(monkeypatch, owner, method, before=partial(self.note, name))

    def note(self, event: str, *_arguments: Any, **_options: Any) -> None:
        self.log.append(event)
        if error := self.fail.pop(event, None):
            raise error

    def _copies(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        device = self

        class HostCopy:
            def __init__(self, tensor: Tensor) -> None:
                self._on_device = tensor.clone()
                device.note(f"copy {name}")

            def wait(self) -> Tensor:
                device.note(f"wait {name}")
                return self._on_device

        monkeypatch.setattr(module, "HostCopy", HostCopy)


def speaking(model: MimoAudio, slots: int = 2, overlaps: bool = True) -> MimoAudio:
    """A model that alternates between 3 words and 5 patches; its engine overlaps as on a GPU."""
    own = own_dialogue(model)
    lm = ScheduledLM.of(model.lm, OPTIONS["max_new_tokens"])
    word, empty = model.tokenizer.encode("a")[0], model.lm.empty_id
    lm.follow(6 * [*3 * [word], *5 * [empty]])
    engine = Engine(lm, slots, capacity=120)
    engine.overlaps = engine.decoder.predict = overlaps
    own.lm = lm
    own.pipeline._engine = engine
    return own


@pytest.fixture
def own(model: MimoAudio) -> MimoAudio:
    return speaking(model)


@pytest.fixture
def engine(engine: Engine) -> Engine:
    engine.overlaps = True
    return engine


@pytest.fixture
def whole(model: MimoAudio) -> list[Chunk]:
    """What is streamed without overlapping."""
    return list(speaking(model, overlaps=False).stream("tts", TEXT, **OPTIONS))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, whole: list[Chunk]) -> Device:
    assert len([chunk for chunk in whole if len(chunk.audio)]) == 30 - LOOKAHEAD
    return Device(monkeypatch)


def test_the_next_group_is_launched_before_the_samples_are_waited_for(own, whole, device):
    assert same(list(own.stream("tts", TEXT, **OPTIONS)), whole)
    groups = " ".join(device.log).split("wait samples")
    # The last group ends the reply, and its chunk is what the codec still holds: nothing follows.
    *groups, end, after = groups
    assert (end.split(), after) == (["wait", "tokens", "codec", "copy", "samples"], "")
    first, *groups = groups
    assert first.split()[:4] == ["copy", "tokens", "wait", "tokens"]
    assert len(groups) == 46
    for group in groups:
        events = group.replace("copy ", "copy_").replace("wait ", "wait_").split()
        # One host read a group, of tokens that were launched before the last chunk's samples were
        # waited for.
        assert events[0] == "wait_tokens"
        assert events.count("wait_tokens") == 1
        assert events.index("copy_samples") < events.index("step") < events.index("copy_tokens")
        if "codec" in events:
            assert events.index("codec") < events.index("copy_samples")
    assert any("codec copy samples step copy tokens patch" in group for group in groups)


def test_without_overlap_it_is_as_lazy_as_a_generator(own, whole, device):
    own.engine.overlaps = False
    stream = own.stream("tts", TEXT, **OPTIONS)
    chunks = []
    for taken in range(48):
        chunks.append(next(stream))
        assert device.log.count("step") == taken
        assert device.log[-1] == "wait samples"
    assert same(chunks, whole)


@pytest.mark.parametrize("taken", [0, 1, 2, 20])
def test_who_stops_has_cost_the_group_in_progress(own, whole, device, taken):
    stream = own.stream("tts", TEXT, **OPTIONS)
    assert same([next(stream) for _ in range(taken)], whole[:taken])
    assert device.log.count("step") == taken
    stream.close()
    assert list(stream) == []
    assert device.log.count("step") == taken
    assert own.engine._in_flight is None
    assert not own.engine._requests
    assert same(list(own.stream("tts", TEXT, **OPTIONS)), whole)


def test_a_conversation_goes_on_where_its_reply_was_left(model, requests):
    """The group in flight leaves no trace in the slot."""
    replies = []
    for overlaps in (False, True):
        engine = Engine(model.lm, 1, CAPACITY)
        engine.overlaps = overlaps
        reply = requests[5].start(engine)
        for _ in range(3):
            next(reply)
            reply.launch_next()
        assert (engine._in_flight is not None) == overlaps
        reply.close()
        sequence = reply._request.sequence
        sequence.add(requests[0].ids[:, :24])
        again = engine.start(sequence, requests[5].limits, requests[5].samplers)
        replies.append((drawn(list(again)), sequence.ids.tolist()))
    assert replies[0] == replies[1]


@pytest.mark.parametrize("event", ["step", "copy tokens", "patch"])
def test_an_error_while_launching_loses_no_chunk_and_is_tried_again(own, whole, device, event):
    stream = own.stream("tts", TEXT, **OPTIONS)
    chunks = [next(stream) for _ in range(20)]
    device.fail[event] = RuntimeError("out of luck")
    chunks += stream
    assert not device.fail
    assert same(chunks, whole)


def test_an_error_that_stays_comes_after_the_chunks_before_it(own, whole, device, monkeypatch):
    stream = own.stream("tts", TEXT, **OPTIONS)
    chunks = [next(stream) for _ in range(19)]
    monkeypatch.setattr(LM, "step", raising(RuntimeError, "device lost"))
    # It was in flight, and comes although the one after it cannot be launched.
    chunks.append(next(stream))
    with pytest.raises(RuntimeError, match="device lost"):
        next(stream)
    assert same(chunks, whole[:20])
    assert list(stream) == []


def test_an_error_that_a_wait_brings_is_that_reply_s_own(engine, requests, alone, monkeypatch):
    """A group that fails when it is waited for is computed again, each row alone."""
    device = Device(monkeypatch)
    replies = [requests[i].start(engine, ahead=None) for i in (3, 4, 5)]
    got = [[next(reply)] for reply in replies]
    replies[0].launch_next()
    assert engine._in_flight is not None
    break_steps(monkeypatch, ValueError("no such thing"), replies[1]._request.row.slot)
    device.fail["wait tokens"] = RuntimeError("an earlier kernel failed")
    got[0] += replies[0]
    got[2] += replies[2]
    with pytest.raises(ValueError, match="no such thing"):
        list(replies[1])
    assert [drawn(groups) for groups in (got[0], got[2])] == [alone[3], alone[5]]
    assert not engine._requests


def test_an_interrupt_while_a_group_is_waited_for_loses_nothing(
    engine, requests, alone, monkeypatch
):
    device, reply = Device(monkeypatch), requests[5].start(engine)
    got = [next(reply)]
    reply.launch_next()
    device.fail["wait tokens"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    assert drawn([*got, *reply]) == alone[5]


class TestManyStreams:
    def test_the_last_to_launch_its_chunk_launches_the_next_group(self, engine, requests):
        """Otherwise a chunk would wait behind a group."""
        first, second = requests[4].start(engine), requests[5].start(engine)
        first.launches = second.launches = True
        first.prefill()
        second.prefill()
        # As if another thread waited for the second's.
        second._request.launching = True
        next(first)
        next(first)
        assert len(second._request.ready) == 1
        first.launch_next()
        assert engine._in_flight is None
        next(second)
        second.launch_next()
        assert engine._in_flight is not None
        assert len(engine._in_flight.requests) == 2
        # A consumer that fails or leaves holds nobody up.
        next(first)
        second._request.launching = True
        second.close()
        first.launch_next()
        assert len(engine._in_flight.requests) == 1

    def test_a_prompt_that_waits_goes_before_the_next_group(self, engine, requests, alone):
        running = requests[5].start(engine)
        got = [next(running)]
        joining = requests[3].start(engine)
        running.launch_next()
        assert engine._in_flight is None
        got.append(next(running))
        assert joining._request.row is not None
        running.launch_next()
        assert len(engine._in_flight.requests) == 2
        assert drawn([*got, *running]) == alone[5]
        assert drawn(list(joining)) == alone[3]

    def test_a_full_engine_overlaps_while_others_queue(self, model, requests, alone):
        engine = Engine(model.lm, 1, CAPACITY)
        engine.overlaps = True
        running, queued = requests[5].start(engine), requests[3].start(engine)
        got = [next(running)]
        running.launch_next()
        assert engine._in_flight is not None
        for group in running:
            got.append(group)
            running.launch_next()
        assert drawn(got) == alone[5]
        assert drawn(list(queued)) == alone[3]

    def test_a_row_that_is_ahead_by_its_bound_is_not_launched(self, engine, requests):
        idle, busy = requests[5].start(engine, ahead=2), requests[4].start(engine)
        idle.prefill()
        for _ in busy:
            busy.launch_next()
        assert idle._request.row.produced == 2

    @pytest.mark.parametrize("count", [2, 4])
    def test_threads_that_stream_get_what_each_gets_alone(self, model, count):
        """With more streams than slots too, where rows move out and back between launches."""
        texts = ["The quick brown fox.", "今天天气真好", "Hi.", "naïve café"][:count]
        alone, shared = (speaking(model, 3, overlaps) for overlaps in (False, True))

        def run(owner: MimoAudio, row: int) -> list[Chunk]:
            return list(copy.copy(owner).stream("tts", texts[row], **(OPTIONS | {"seed": row})))

        got = in_threads(partial(run, shared), count)
        for row in range(count):
            assert same(got[row], run(alone, row))
        assert shared.engine._in_flight is None
        assert not shared.engine._requests


def test_a_chunk_leaves_the_memory_it_was_copied_to(own, device):
    for chunk in own.stream("tts", TEXT, **OPTIONS):
        assert torch.equal(chunk.audio.clone().mul_(0.5), chunk.audio.mul_(0.5))
