"""Several replies as one stream of speech."""

import asyncio
import copy
import gc
import itertools
import threading
import time
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from dialogues import collected, history
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast import Chunk, MimoAudio, PromptError
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.stream import ChunkStream
from mimo_fast.runtime.pipeline import Pipeline
from mimo_fast.runtime.speech import FADE, PAUSE, Joiner
from mimo_fast.text import tasks
from mimo_fast.text.prompt import Speech

RATE, GROUP, CONTEXT = 24_000, 4, 96
TEXT = "The quick brown fox. It runs away. 今天天气真好。 The end."
PIECES = ["The quick brown fox.", "It runs away.", "今天天气真好。", "The end."]
FIXED: dict[str, Any] = {"seed": 3, "min_new_tokens": 0}


def stating(model: MimoAudio, **stated: Any) -> MimoAudio:
    """A model whose checkpoint states something; its context, and so each reply, is short."""
    stated = {"max_positions": CONTEXT} | stated
    own = copy.copy(model)
    own.lm = copy.copy(own.lm)
    own.lm.config = replace(own.lm.config, **stated)
    own.task_sampler_configs = own.pipeline.presets
    return own


@pytest.fixture
def sentences(model) -> MimoAudio:
    """A model that says a sentence at once, and knows no voice but its own."""
    return stating(model, sentences_at_once=1, trained_tasks=("tts_sft", "tts_sft.instruct"))


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of each prompt."""
    requests = list[dict[str, Any]]()
    build = tasks.TASKS["tts_sft"].prompt

    @wraps(build)
    def prompt(*arguments: Any, **named: Any) -> Any:
        requests.append(
            dict(zip(("context", "input", "instruct"), arguments, strict=False)) | named
        )
        return build(*arguments, **named)

    task = replace(tasks.TASKS["tts_sft"], prompt=prompt)
    monkeypatch.setitem(tasks.TASKS, "tts_sft", task)
    return requests


def sound(chunks: list[Chunk]) -> Tensor:
    return torch.cat([chunk.audio for chunk in chunks])


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


class TestJoiner:
    def joined(self, pieces: list[Tensor], size: int) -> Tensor:
        joiner, out = Joiner(RATE), list[Tensor]()
        for i, piece in enumerate(pieces):
            out += [joiner.push(part) for part in piece.split(size)] if len(piece) else []
            out.append(joiner.end(last=i == len(pieces) - 1))
        return torch.cat(out)

    @given(
        lengths=st.lists(st.integers(0, 2000), min_size=1, max_size=4), size=st.integers(1, 2000)
    )
    def test_parts_of_any_size_give_the_same(self, lengths, size):
        pieces = [torch.sin(torch.arange(n) * 0.05 * (i + 1) + 1) for i, n in enumerate(lengths)]
        whole = self.joined(pieces, 4000)
        assert torch.equal(self.joined(pieces, size), whole)
        gaps = max(sum(n > 0 for n in lengths) - 1, 0)
        assert len(whole) == sum(lengths) + gaps * round(PAUSE * RATE)

    def test_no_jump_is_larger_than_those_inside(self):
        pieces = [torch.cos(torch.arange(4801) * step) for step in (0.05, 0.11, 0.3)]
        whole = self.joined(pieces, 960)
        inside = max(float(piece.diff().abs().max()) for piece in pieces)
        assert float(whole.diff().abs().max()) <= inside
        # Put together as they are, they click.
        assert float(torch.cat([pieces[0], torch.zeros(9), pieces[1]]).diff().abs().max()) > inside

    def test_only_the_ends_that_meet_are_touched(self):
        pieces = [torch.ones(3000), torch.ones(3000)]
        whole, fade, gap = self.joined(pieces, 500), round(FADE * RATE), round(PAUSE * RATE)
        assert (whole[: 3000 - fade] == 1).all()
        assert (whole[3000 + gap + fade :] == 1).all()
        falling, rising = whole[3000 - fade : 3000], whole[3000 + gap : 3000 + gap + fade]
        torch.testing.assert_close(falling**2 + rising**2, torch.ones(fade))
        assert (whole[3000 : 3000 + gap] == 0).all()
        assert (falling.diff() < 0).all()


class TestSplit:
    def test_each_sentence_is_said_and_comes_in_one_stream(self, sentences, asked):
        stream = sentences.stream("tts", TEXT, split=True, **FIXED)
        assert stream.finish_reason is None
        chunks = list(stream)
        assert [each["input"] for each in asked] == PIECES
        alone = [list(sentences.stream("tts", piece, **FIXED)) for piece in PIECES]
        counts = [each[-1].timing.groups for each in alone]
        assert chunks[-1].timing.groups == sum(counts) == len(chunks)
        said = [text_of(each).strip() for each in alone]
        assert text_of(chunks).split() == " ".join(said).split()
        heard = [sound(each) for each in alone if len(sound(each))]
        gaps = (len(heard) - 1) * round(PAUSE * RATE)
        assert len(sound(chunks)) == sum(map(len, heard)) + gaps
        # A piece is heard as it would be alone, but for its ends.
        middle = heard[0][: -round(FADE * RATE)]
        assert torch.equal(sound(chunks)[: len(middle)], middle)

    def test_times_and_reasons_are_those_of_one_reply(self, sentences):
        chunks = list(sentences.stream("tts", TEXT, split=True, max_new_tokens=90, **FIXED))
        times = [chunk.timing for chunk in chunks]
        assert [time.groups for time in times] == list(range(1, len(chunks) + 1))
        assert [time.elapsed for time in times] == sorted(time.elapsed for time in times)
        assert len({time.prefill for time in times}) == 1
        samples = itertools.accumulate(len(chunk.audio) for chunk in chunks)
        assert [time.audio_seconds for time in times] == [n / RATE for n in samples]
        first = next(i for i, chunk in enumerate(chunks) if len(chunk.audio))
        assert {time.first_audio for time in times[first:]} == {times[first].elapsed}
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)

    @pytest.mark.parametrize("limit", [1, 2, 17])
    def test_the_limit_holds_for_all_pieces_together(self, sentences, limit):
        stream = sentences.stream("tts", TEXT, split=True, max_new_tokens=limit, seed=3)
        chunks = list(stream)
        assert chunks[-1].timing.groups == len(chunks) == limit
        assert chunks[-1].finish_reason == stream.finish_reason == "length"
        assert stream.ended

    def test_a_reason_of_any_piece_is_told_at_the_end(self, sentences, monkeypatch):
        worst, inner_stream = iter(["stop", "context", "length", "stop"]), Pipeline.stream

        def renamed(*given: Any, **options: Any) -> ChunkStream:
            reason, chunks = next(worst), inner_stream(*given, **options)
            inner = chunks._chunks
            chunks._chunks = (  # type: ignore[assignment]
                replace(chunk, finish_reason=chunk.finish_reason and reason) for chunk in inner
            )
            return chunks

        monkeypatch.setattr(Pipeline, "stream", renamed)
        stream = sentences.stream("tts", TEXT, split=True, **FIXED)
        assert [chunk.finish_reason for chunk in stream if chunk.finish_reason] == ["context"]
        assert stream.finish_reason == "context"

    @pytest.mark.parametrize("instruct", [None, "happy"])
    def test_the_first_sentence_is_the_voice_of_the_others(self, model, asked, instruct):
        own = stating(model, sentences_at_once=1, max_positions=220)
        request: dict[str, Any] = {"instruct": instruct}
        list(own.stream("tts", TEXT, **request, split=True, **FIXED, max_new_tokens=400))
        voices = [each.get("prompt_speech") for each in asked]
        assert voices[0] is None
        assert all(isinstance(voice, Speech) for voice in voices[1:])
        ids = own.get_tts_sft_prompt(PIECES[0], instruct, seed=3)
        reply = [*own.stream("tts", PIECES[0], instruct, **FIXED)]
        spoken = history(own)[:, ids.shape[1] : -GROUP]
        codes = spoken[1:, spoken[0] == own.empty_token]
        assert len(reply) == spoken.shape[1] // GROUP + 1
        assert all(torch.equal(voice.codes, codes) for voice in voices[1:])
        forms = [each.get("read_text_only", True) for each in asked[1:]]
        assert all(form is (instruct is not None) for form in forms[: len(PIECES) - 1])

    def test_a_voice_that_is_given_is_that_of_all(self, model, audio, asked):
        own, voice = stating(model, sentences_at_once=1, max_positions=260), model.speech(audio[0])
        options = {"split": True, "max_new_tokens": 60} | FIXED
        list(own.stream("tts", TEXT, "happy", prompt_speech=voice, **options))
        assert all(each["prompt_speech"] is voice for each in asked)

    def test_a_model_that_knows_no_voices_is_given_none(self, sentences, asked):
        list(sentences.stream("tts", TEXT, split=True, **FIXED))
        assert len(asked) == 4
        assert not any(each.get("prompt_speech") for each in asked)

    def test_a_checkpoint_that_states_nothing_says_it_at_once(self, model, asked):
        chunks = list(model.stream("tts", TEXT, split=True, max_new_tokens=20, **FIXED))
        whole = list(model.stream("tts", TEXT, max_new_tokens=20, **FIXED))
        assert torch.equal(sound(chunks), sound(whole))
        assert [each["input"] for each in asked] == [TEXT] * 2

    def test_tts_sft_stays_one_pass(self, sentences, asked):
        sentences.tts_sft(TEXT, None, max_new_tokens=5)
        list(sentences.stream("tts", TEXT, max_new_tokens=5))
        assert [each["input"] for each in asked] == [TEXT] * 2

    def test_words_too_many_for_one_piece(self, model, asked):
        own = stating(model, sentences_at_once=1, words_at_once=3, trained_tasks=("tts_sft",))
        list(own.stream("tts", "one two three four, five. six", split=True, **FIXED))
        assert [each["input"] for each in asked] == [
            "one two three four,"[:7],
            *["three four,", "five.", "six"],
        ]

    def test_what_it_does_not_go_with(self, sentences, audio):
        for task, request, options in (
            ("asr", [audio[1]], {}),
            ("tts", ["Hi. You."], {"add_history": True}),
            ("tts", ["Hi. You."], {"read_text_only": False}),
        ):
            with pytest.raises(ValueError, match=r"^split=True "):
                sentences.stream(task, *request, split=True, **options)
        with pytest.raises(PromptError, match="broken character at position 9"):
            sentences.stream("tts", "Hi. You. \ud800", split=True)
        with pytest.raises(TypeError, match="voice"):
            sentences.stream("tts", "Hi. You.", split=True, voice=1)


class TestEnding:
    @pytest.mark.parametrize("taken", [0, 1, 9, 40])
    def test_closing_ends_all_of_it(self, sentences, asked, taken):
        stream = sentences.stream("tts", TEXT, split=True, **FIXED)
        for _ in range(taken):
            next(stream)
        started = len(asked)
        stream.close()
        assert list(stream) == []
        assert (stream.finish_reason, stream.ended) == ("cancelled", True)
        assert len(asked) == started
        assert not [other for other in sentences.engine._requests if not other.done]
        stream.close()

    def test_from_another_thread_while_it_is_read(self, sentences):
        stream = sentences.stream("tts", TEXT * 20, split=True, **FIXED)
        got = list[Chunk]()
        reader = threading.Thread(target=lambda: got.extend(stream))
        reader.start()
        while not got:
            time.sleep(0.01)
        stream.close()
        reader.join(10)
        assert not reader.is_alive()
        assert stream.finish_reason == "cancelled"

    def test_a_stream_that_nobody_holds_is_gone(self, sentences):
        stream = sentences.stream("tts", TEXT, split=True, **FIXED)
        next(stream)
        del stream
        sentences.engine._sweep()
        assert not sentences.engine._requests

    def test_an_error_of_a_piece_ends_the_stream(self, sentences, monkeypatch):
        stream = sentences.stream("tts", TEXT, split=True, **FIXED)
        next(stream)

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("out of order")

        monkeypatch.setattr(MimoAudio, "_start", broken)
        with pytest.raises(RuntimeError, match="out of order"):
            list(stream)
        assert list(stream) == []

    def test_asyncio(self, sentences):
        stream = sentences.astream("tts", TEXT, split=True, **FIXED)
        chunks = asyncio.run(collected(stream))
        want = list(sentences.stream("tts", TEXT, split=True, **FIXED))
        assert torch.equal(sound(chunks), sound(want))
        assert text_of(chunks) == text_of(want)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pieces(sentences):
    counts = set[int]()
    stream = sentences.stream("tts", "The fox. " * 40, split=True, max_new_tokens=400, **FIXED)
    for i, _ in enumerate(stream):
        if i % 50 == 0:
            gc.collect()
            counts.add(sum(type(each) is TokenSequence for each in gc.get_objects()))
    assert max(counts) - min(counts) <= 1, counts
