"""The pipeline alone, as a server uses it: it does what the facade does, and parts can change."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch

import mimo_fast
from mimo_fast import MimoAudio, PromptError, Session
from mimo_fast.runtime.pipeline import Pipeline
from mimo_fast.runtime.transcription import TranscriptStream
from mimo_fast.text.context import PromptContext
from mimo_fast.text.prompt import Speech
from mimo_fast.text.tasks import TASKS, asr


@pytest.fixture
def pipeline(model: MimoAudio) -> Pipeline:
    return model.pipeline


@pytest.fixture
def words() -> torch.Tensor:
    path = Path(__file__).parents[1] / "words" / "what_is_your_name.flac"
    return mimo_fast.load_audio(path, 24_000)


def test_a_request_is_what_the_facade_makes_of_it(model, pipeline, audio):
    task, began = TASKS["spoken_dialogue_sft"], perf_counter()
    ids = pipeline.prompt(task, audio[1], system_prompt="Be brief.")
    assert torch.equal(ids, model.get_spoken_dialogue_sft_prompt(audio[1], "Be brief.").cpu())
    sequence = pipeline.sequence(seed=3)
    sequence.add(ids)
    stops = task.stop_ids(pipeline.tokenizer.special)
    reply = pipeline.decode(sequence, pipeline.samplers(task.sampler), stops, 20, 20)
    chunks = list(pipeline.stream(reply, ids, began))
    options = {"seed": 3, "max_new_tokens": 20, "min_new_tokens": 20}
    want = list(copy(model).stream("spoken_dialogue", audio[1], "Be brief.", **options))
    assert [chunk.text for chunk in chunks] == [chunk.text for chunk in want]
    assert all(torch.equal(got.audio, each.audio) for got, each in zip(chunks, want, strict=True))


def test_a_session_needs_no_facade(model, pipeline, audio):
    alone, own = Session(pipeline, seed=1), model.session(seed=1)
    for session in (alone, own):
        list(session.stream(audio[1], max_new_tokens=6))
    assert torch.equal(alone.ids, own.ids)


def test_another_codec_keeps_the_engine_and_another_language_model_does_not(pipeline):
    engine = pipeline.engine
    assert replace(pipeline, codec=copy(pipeline.codec)).engine is engine
    assert replace(pipeline, lm=copy(pipeline.lm)).engine is not engine


def test_a_model_with_another_part_leaves_its_copies_alone(model):
    own = copy(model)
    own.lm = copy(model.lm)
    assert own.engine.lm is own.lm
    assert model.engine.lm is model.lm is not own.lm


def test_encoded_speech_needs_no_codec(pipeline, audio):
    speech = pipeline.speech(audio[1])
    assert pipeline.speech(speech) is speech
    assert pipeline.speech(speech, closed=False) == Speech(speech.codes, closed=False)
    without = pipeline.ids(asr(PromptContext(), speech, template=0))
    assert torch.equal(without, pipeline.ids(asr(pipeline.context(), audio[1], template=0)))
    with pytest.raises(PromptError, match="needs a codec"):
        asr(PromptContext(), audio[1])


def test_recordings_are_prepared_where_that_is_asked_for(pipeline, words):
    """For every task that takes speech, sessions included; pieces of a transcript never twice."""
    quiet = torch.cat([torch.zeros(48_000), 0.01 * words, torch.zeros(48_000)])
    ready = mimo_fast.prepare_speech(quiet)
    assert len(ready) < len(quiet)
    preparing = replace(pipeline, prepares=True)
    for encode in ("speech", "speech_later"):
        got, want = getattr(preparing, encode)(quiet), getattr(pipeline, encode)(ready)
        assert torch.equal(got.codes, want.codes)
    assert len(pipeline.speech(quiet).codes[0]) > len(ready) // 960 + 50
    segments = asr(preparing.context(), quiet, template=0)
    assert torch.equal(
        preparing.ids(segments), pipeline.ids(asr(pipeline.context(), ready, template=0))
    )
    session = Session(preparing, seed=1)
    list(session.stream(quiet, max_new_tokens=2))
    want = Session(pipeline, seed=1)
    list(want.stream(ready, max_new_tokens=2))
    assert torch.equal(session.ids, want.ids)
    stream = TranscriptStream(preparing, quiet, seed=1, max_new_tokens=2)
    assert list(stream) == list(TranscriptStream(pipeline, quiet, seed=1, max_new_tokens=2))


def test_a_model_is_loaded_so(words):
    with mimo_fast.load(prepare=True) as model:
        assert model.pipeline.prepares
        quiet = torch.cat([torch.zeros(48_000), 0.003 * words, torch.zeros(72_000)])
        assert model.asr_sft(quiet, seed=1) == "what is your name"
