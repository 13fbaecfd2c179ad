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
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.stream import LOOKAHEAD
from mimo_fast.runtime.engine import voicing
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm import decode

OPTIONS: dict[str, Any] = {"seed": 2, "max_new_tokens": 48, "min_new_tokens": 48}
TEXT = "The quick brown fox."


class Device:
    """Logs launches and waits of the host; a copy shows its content to who has waited for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self._copies(monkeypatch, voicing, "samples")
        self._copies(monkeypatch, decode, "tokens")
        for owner, method, name in (
            (LM, "step", "step"),
            (LM, "sample_patch", "patch"),
            (Codec, "advance", "codec"),
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
    log = " ".join(device.log).replace("copy ", "copy_").replace("wait ", "wait_")
    first, *groups = log.split("wait_tokens ")
    # The first group is drawn from the prompt; with each other one begins what the host does of it:
    # its tokens were launched before the samples of the last one were waited for.
    assert first.split() == ["copy_tokens"]
    *groups, end = groups
    # The last group ends the reply, and its chunk is what the codec still holds: nothing follows.
    assert end.split() == ["codec", "copy_samples", "wait_samples"]
    assert len(groups) == 47
    heard = 0
    for events in (group.split() for group in groups):
        assert events.count("step") == events.count("copy_tokens") == 1
        assert events.index("step") < events.index("copy_tokens")
        if "codec" in events:
            assert events.index("codec") < events.index("step")
        if "copy_samples" in events:
            heard += 1
            assert events.index("codec") < events.index("copy_samples") < events.index("step")
            assert events[-1] == "wait_samples"
    assert heard == 30 - LOOKAHEAD - 1
    assert "codec copy_samples step copy_tokens patch wait_samples" in log


def test_without_overlap_it_is_as_lazy_as_a_generator(own, whole, device):
    own.engine.overlaps = False
    stream = own.stream("tts", TEXT, **OPTIONS)
    chunks = []
    for taken in range(48):
        chunks.append(next(stream))
        assert device.log.count("step") == taken
        assert device.log[-1] == ("wait samples" if len(chunks[-1].audio) else device.log[-1])
    assert same(chunks, whole)


@pytest.mark.parametrize("taken", [0, 1, 2, 20])
def test_who_stops_has_cost_the_group_in_progress(own, whole, device, taken):
    stream = own.stream("tts", TEXT, **OPTIONS)
    assert same([next(stream) for _ in range(taken)], whole[:taken])
    assert device.log.count("step") == taken
    stream.close()
    assert list(stream) == []
    assert device.log.count("step") == taken
    assert own.engine.steps.in_flight is None
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
        assert (engine.steps.in_flight is not None) == overlaps
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
    assert engine.steps.in_flight is not None
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
    device.fail["wait tokens"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    assert drawn([*got, *reply]) == alone[5]


class TestManyStreams:
    def test_a_prompt_that_waits_goes_before_the_next_group(self, engine, requests, alone):
        running = requests[5].start(engine)
        got = [next(running)]
        assert len(engine.steps.in_flight.requests) == 1
        joining = requests[3].start(engine)
        got.append(next(running))
        # The group in flight was collected, and none launched in the place of a prompt.
        assert engine.steps.in_flight is None
        got.append(next(running))
        assert joining._request in engine.steps.in_flight.requests
        assert drawn([*got, *running]) == alone[5]
        assert drawn(list(joining)) == alone[3]

    def test_a_full_engine_overlaps_while_others_queue(self, model, requests, alone):
        engine = Engine(model.lm, 1, CAPACITY)
        engine.overlaps = True
        running, queued = requests[5].start(engine), requests[3].start(engine)
        got = [next(running)]
        assert engine.steps.in_flight is not None
        got += running
        assert drawn(got) == alone[5]
        assert drawn(list(queued)) == alone[3]

    def test_a_row_that_is_ahead_by_its_bound_is_not_launched(self, engine, requests):
        idle, busy = requests[5].start(engine, ahead=2), requests[4].start(engine)
        idle.prefill()
        list(busy)
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
        assert shared.engine.steps.in_flight is None
        assert not shared.engine._requests


def test_a_chunk_leaves_the_memory_it_was_copied_to(own, device):
    for chunk in own.stream("tts", TEXT, **OPTIONS):
        assert torch.equal(chunk.audio.clone().mul_(0.5), chunk.audio.mul_(0.5))
