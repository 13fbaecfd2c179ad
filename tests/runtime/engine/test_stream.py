"""Streaming: equal to the whole reply, timed, stopped by closing, asynchronous."""

import asyncio
import copy
import threading
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, ClassVar

import pytest
import torch
from dialogues import METHODS, arguments, collected, history, last_reply, own_dialogue, same
from helpers import snr_db, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast import LM, Chunk, MimoAudio
from mimo_fast.runtime.engine.voicing import ReplyReader
from mimo_fast.text.tasks import TASKS

GROUP, FRAME = 4, 960


@pytest.fixture
def own(model: MimoAudio) -> MimoAudio:
    return own_dialogue(model)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every backbone step."""
    counted = list[int]()
    watch(monkeypatch, LM, "step", lambda *_: counted.append(1))
    return counted


class Gate:
    """Holds each backbone step, in whatever thread, until it is opened."""

    def __init__(self) -> None:
        self.passed, self._held, self._opened = 0, threading.Event(), threading.Semaphore(0)

    def hold(self, *_arguments: Any) -> None:
        self._held.set()
        assert self._opened.acquire(timeout=10)
        self.passed += 1

    async def until_held(self) -> None:
        while not self._held.is_set():
            await asyncio.sleep(0)
        self._held.clear()

    def open(self, steps: int = 1) -> None:
        self._opened.release(steps)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    watch(monkeypatch, LM, "step", gate.hold)
    return gate


def fixed(groups: int, seed: int = 1) -> dict[str, Any]:
    """Options of a reply of so many groups."""
    return {"seed": seed, "max_new_tokens": groups, "min_new_tokens": groups}


def sound(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.audio for chunk in chunks])


@pytest.mark.parametrize("task", METHODS)
def test_a_stream_equals_the_whole_reply(own, audio, golden, task):
    new = 48 if TASKS[task].speaks else 16
    options = fixed(new, seed=2)
    chunks = list(own.stream(task, *arguments(task, audio), **options))
    streamed = history(own)
    given = arguments(task, audio) + ([None] if task == "tts_sft" else [])
    text = "".join(chunk.text for chunk in chunks).strip()
    assert text == getattr(own, task)(*given, **options) != ""
    assert torch.equal(streamed, history(own))
    _, codes = last_reply(own, new)
    assert codes.shape[1]
    if not TASKS[task].speaks:
        assert all(len(chunk.audio) == 0 for chunk in chunks)
        return
    assert len([chunk for chunk in chunks if len(chunk.audio)]) > 1
    upstream = snr_db(golden.get("codec:stream_wav.4"), golden.get("codec:stream_oneshot"))
    assert snr_db(sound(chunks), own.codec.decode(codes)) >= upstream
    assert {(chunk.sample_rate, chunk.audio.dtype) for chunk in chunks} == {(24000, torch.float32)}


def test_a_style_instruction_streams_as_well(own, audio):
    """It is the one spoken prompt that ends before the start of speech."""
    style: dict[str, Any] = {"instruct": "happy", "prompt_speech": audio[1], "template": 0}
    chunks = list(own.stream("tts", "Hi.", **style, **fixed(30, seed=2)))
    prompt = own.get_tts_sft_prompt("Hi.", **style)
    assert torch.equal(history(own)[:, : prompt.shape[1]], prompt)
    _, codes = last_reply(own, 30)
    assert len(sound(chunks)) == codes.shape[1] * FRAME > 0


def test_timing_only_grows(own, audio):
    chunks = list(own.stream("spoken_dialogue", audio[1], **fixed(48)))
    times = [chunk.timing for chunk in chunks]
    assert [t.groups for t in times] == list(range(1, 49))
    elapsed = [t.elapsed for t in times]
    assert elapsed == sorted(elapsed)
    assert 0 < times[0].prefill <= elapsed[0]
    assert {t.prefill for t in times} == {times[0].prefill}
    first = next(i for i, chunk in enumerate(chunks) if len(chunk.audio))
    assert 0 < first < 47
    assert [t.first_audio for t in times] == [None] * first + [elapsed[first]] * (48 - first)
    samples = accumulate(len(chunk.audio) for chunk in chunks)
    assert [t.audio_seconds for t in times] == [n / 24000 for n in samples]


class TestStopping:
    @pytest.mark.parametrize("taken", [0, 1, 7])
    def test_closing_stops_decoding(self, own, steps, taken):
        whole = list(own.stream("tts", "Hi.", **fixed(12)))
        assert len(steps) == 11
        steps.clear()
        stream = own.stream("tts", "Hi.", **fixed(12))
        assert same([next(stream) for _ in range(taken)], whole[:taken])
        stream.close()
        assert list(stream) == []
        assert len(steps) == max(taken - 1, 0)

    def test_an_error_of_the_consumer_leaves_the_model_usable(self, own, steps):
        def consume(limit: int) -> list[Chunk]:
            chunks = list[Chunk]()
            for chunk in own.stream("tts", "Hi.", **fixed(12)):
                if len(chunks) == limit:
                    raise ConnectionError
                chunks.append(chunk)
            return chunks

        whole = consume(100)
        steps.clear()
        with pytest.raises(ConnectionError):
            consume(3)
        assert len(steps) == 3
        assert same(consume(100), whole)

    @pytest.mark.parametrize("models", [1, 2])
    def test_streams_side_by_side_do_not_meet(self, model, models):
        owners = [copy.copy(model) for _ in range(models)] * (2 // models)

        def start(row: int) -> Iterator[Chunk]:
            text = ["The quick brown fox.", "今天天气真好"][row]
            return owners[row].stream("tts", text, **fixed(40, seed=row))

        together = zip(*zip(start(0), start(1), strict=True), strict=True)
        for row, chunks in enumerate(together):
            assert same(list(chunks), list(start(row)))

    def test_chunks_are_ordinary_tensors(self, own):
        for chunk in own.stream("tts", "Hi.", **fixed(30)):
            assert not torch.is_inference_mode_enabled()
            assert torch.equal(chunk.audio.clone().mul_(0.5), chunk.audio.mul_(0.5))


def read(reader: ReplyReader, tokens: list[int | Tensor]) -> tuple[list[str], list[list[Tensor]]]:
    """Texts and patches that each group, and then the end, makes final. A tensor is a patch."""
    empty, nothing = reader.tokenizer.special.empty, torch.zeros(8, GROUP)
    got = [
        reader.read(empty, t) if isinstance(t, Tensor) else reader.read(t, nothing) for t in tokens
    ]
    texts, patches = zip(*got, reader.finish(), strict=True)
    return list(texts), list(patches)


def patch(number: int) -> Tensor:
    return torch.full((8, GROUP), number)


class TestReading:
    @pytest.mark.parametrize("text", ["今天天气真好", "🙂👩‍👩‍👧", "naïve café", "a🙂b"])
    def test_characters_come_whole(self, model, text):
        tokens: list[Any] = model.tokenizer.encode(text)
        assert any("\ufffd" in model.tokenizer.decode([token]) for token in tokens)
        spread = [piece for token in tokens for piece in (token, patch(0), model.eot_idx)]
        for sequence in (tokens, spread):
            pieces, _ = read(ReplyReader(model.tokenizer, speaking=True), sequence)
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)
            assert pieces[-1] == ""

    @settings(max_examples=200)
    @given(st.lists(st.integers(0, 399) | st.sampled_from([*"今🙂é"]) | st.none(), max_size=12))
    def test_pieces_join_to_the_text_of_all_tokens(self, model, drawn):
        tokens: list[int | Tensor] = []
        for item in drawn:
            one = [patch(0) if item is None else item]
            tokens += model.tokenizer.encode(item) if isinstance(item, str) else one
        pieces, _ = read(ReplyReader(model.tokenizer, speaking=True), tokens)
        words = [token for token in tokens if isinstance(token, int)]
        assert "".join(pieces) == model.tokenizer.decode(words)

    def test_half_a_character_comes_at_the_end(self, model):
        first, *_ = model.tokenizer.encode("🙂")
        sequence = [*model.tokenizer.encode("Hi"), first]
        pieces, _ = read(ReplyReader(model.tokenizer, speaking=True), sequence)
        assert (pieces[-2], pieces[-1]) == ("", "\ufffd")

    @pytest.mark.parametrize(
        ("speaking", "sequence", "spoken"),
        [
            (True, ["p0", "p1"], [[0], [1], []]),
            (True, ["p0", "eostm", "p1"], [[0], [], [], []]),
            (True, ["p0", "sostm", "p1"], [[0], [], [1], []]),
            (False, ["p0", "p1"], [[], [], [0, 1]]),
            (False, ["p0", "sostm", "p1", "p2"], [[], [], [1], [2], []]),
            (False, ["p0", "sostm", "p1", "eostm", "p2"], [[], [], [1], [], [], []]),
            (False, ["p0", "p1", "eostm", "p2"], [[], [], [0, 1], [], []]),
            (False, ["sostm", "p0", "sostm", "p1"], [[], [0], [], [1], []]),
            (False, ["eostm", "p0", "sostm", "p1"], [[], [], [], [], []]),
        ],
    )
    def test_speech_is_between_its_marks(self, model, speaking, sequence, spoken):
        special = model.tokenizer.special
        tokens = [
            patch(int(name[1])) if name[0] == "p" else getattr(special, name) for name in sequence
        ]
        _, patches = read(ReplyReader(model.tokenizer, speaking), tokens)
        assert [[int(p[0, 0]) for p in group] for group in patches] == spoken


class TestAsync:
    OPTIONS: ClassVar = fixed(12)

    def test_gives_the_same_chunks(self, own):
        chunks = asyncio.run(collected(own.astream("tts", "Hi.", **self.OPTIONS)))
        assert same(chunks, list(own.stream("tts", "Hi.", **self.OPTIONS)))

    def test_the_event_loop_runs_while_a_group_is_decoded(self, own, gate):
        async def open_for_all() -> None:
            while True:
                await gate.until_held()
                gate.open()

        async def consume() -> int:
            opener = asyncio.create_task(open_for_all())
            chunks = await collected(own.astream("tts", "Hi.", **self.OPTIONS))
            opener.cancel()
            return len(chunks)

        assert asyncio.run(consume()) == 12
        assert gate.passed == 11

    @pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
    def test_cancelling_stops_after_the_group_in_progress(self, own, gate, times):
        async def consume(chunks: list[Chunk]) -> None:
            async for chunk in own.astream("tts", "Hi.", **self.OPTIONS):
                chunks.append(chunk)

        async def cancel() -> list[Chunk]:
            chunks = list[Chunk]()
            consumer = asyncio.create_task(consume(chunks))
            await gate.until_held()
            for turn in range(5):
                if turn < times:
                    consumer.cancel()
                await asyncio.sleep(0)
            # Only a loop that did not wait for the group gets here.
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await consumer
            return chunks

        assert len(asyncio.run(cancel())) == 1
        assert gate.passed == 1
        gate.open(11)
        assert len(list(own.stream("tts", "Hi.", **self.OPTIONS))) == 12

    def test_leaving_the_loop_stops_decoding(self, own, steps):
        async def consume(task: str) -> None:
            async for _ in own.astream(task, "Hi.", **self.OPTIONS):
                break

        asyncio.run(consume("tts"))
        assert len(steps) == 0
        with pytest.raises(ValueError, match="no task 'sing'"):
            asyncio.run(consume("sing"))
