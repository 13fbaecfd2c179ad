"""Confidence: what its evidence is, where it comes out, and how often it is right for nano."""

import copy
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import KIT, fault

import mimo_fast
from mimo_fast import ReplyText
from mimo_fast.checkpoint.embedded import NANO, QUESTION
from mimo_fast.config import Calibration, LMConfig
from mimo_fast.errors import ConfigError
from mimo_fast.runtime.confidence import assess, evidence
from mimo_fast.text.prompt import Speech
from mimo_fast.text.tasks import TASKS

FOREIGN = sorted((Path(__file__).parents[1] / "foreign").glob("*.flac"))
WORDS = sorted((Path(__file__).parents[1] / "words").glob("*.flac"))
SURE = Calibration("asr", -1.0, -2.0, -3.0, -4.0, 0.5)


@pytest.fixture(scope="module")
def nano() -> mimo_fast.MimoAudio:
    return mimo_fast.load("nano", "nano", "cpu")


def asked(model: mimo_fast.MimoAudio, calibration: Calibration | None) -> mimo_fast.MimoAudio:
    """The model as if its checkpoint stated this calibration alone."""
    twin = copy.copy(model)
    twin.pipeline = replace(model.pipeline, lm=copy.copy(model.lm))
    stated = () if calibration is None else (calibration,)
    twin.lm.config = replace(model.lm.config, confidence=stated)
    return twin


def test_the_evidence_is_that_of_each_step_of_decoding(nano):
    """Teacher forcing over prompt and reply, against logits of one prefix after the other."""
    lm, pipeline = nano.lm, nano.pipeline
    prompt = nano.get_asr_sft_prompt(WORDS[0], template=0).cpu()
    stops = TASKS["asr_sft"].stop_ids(pipeline.tokenizer.special)
    sequence = pipeline.sequence(0)
    sequence.add(prompt)
    reply = pipeline.decode(sequence, pipeline.samplers("asr"), stops)
    tokens = [group.text for group in reply]
    entropies, surprise, size = [], 0.0, lm.config.group_size
    for i, token in enumerate(tokens):
        end = prompt.shape[1] // size + i
        ids = sequence.ids[:, : end * size]
        # The last row of a shorter pass is the distribution that this token came from.
        text, codes = ids[0, ::size], ids[1:].unflatten(1, (-1, size)).transpose(0, 1)
        hidden = mimo_fast.runtime.lm.teacher_forcing.hidden_states(lm, text[None], codes[None])
        logs = lm.text_logits(hidden[0, -1:]).double().log_softmax(-1)[0]
        entropies.append(float(-(logs.exp() * logs).sum()))
        surprise -= float(logs[token])
    found = evidence(lm, sequence.ids, len(tokens))
    assert found[0] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    assert found[1] == pytest.approx(math.log1p(surprise), abs=1e-4)
    assert evidence(lm, prompt, 0) == (0.0, 0.0)


def test_the_loss_is_what_the_codes_lose(nano):
    wav = torch.randn(24000, generator=torch.Generator().manual_seed(1)) * 0.1
    codes, loss = nano.codec.encode_measured(wav, 8)
    assert torch.equal(codes, nano.codec.encode(wav, 8))
    fewer = nano.codec.encode_measured(wav, 2)[1]
    assert 0 < float(loss) < float(fewer) < 1
    # A book of zeros quantizes nothing.
    books = replace(nano.codec.codebooks, table=torch.zeros_like(nano.codec.codebooks.table))
    books = replace(books, books=tuple(torch.zeros_like(book) for book in books.books))
    codec = copy.copy(nano.codec)
    codec.codebooks = books
    assert float(codec.encode_measured(wav, 8)[1]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "values", [(0.0, 0.0, 0.04), (9.0, 9.0, 0.04), (0.0, 0.0, 0.0), (1e9,) * 3]
)
def test_a_confidence_is_between_0_and_1_and_says_when_it_is_low(values):
    found = assess(SURE, *values)
    assert 0 <= found.value <= 1
    assert (found.warning is None) == (found.value >= SURE.warns_below)
    if found.warning:
        assert "\n" not in found.warning
        assert f"confidence {found.value:.2f}" in found.warning


def test_more_doubt_is_less_confidence():
    value = [
        assess(SURE, *each).value for each in ((0, 0, 0.1), (1, 0, 0.1), (1, 1, 0.1), (1, 1, 0.2))
    ]
    assert value == sorted(value, reverse=True)
    assert len({*value}) == 4


def test_every_way_to_ask_gives_the_same_confidence(nano):
    recording = WORDS[1]
    text = nano.asr_sft(recording, seed=3)
    *before, last = nano.stream("asr", recording, seed=3)
    assert isinstance(text, ReplyText)
    assert text.confidence == last.confidence
    assert text.warning is last.warning is None
    assert nano.lm.config.calibration("asr").warns_below <= text.confidence <= 1
    assert all(chunk.confidence is chunk.warning is None for chunk in before)
    encoded = nano.speech(recording)
    assert isinstance(encoded, Speech)
    assert nano.asr_sft(encoded, seed=3).confidence == text.confidence
    assert nano.asr_sft(recording, seed=3, max_new_tokens=None).confidence == text.confidence
    kept = pickle.loads(pickle.dumps(text))
    assert (kept, kept.confidence, kept.warning) == (text, text.confidence, text.warning)


@pytest.mark.slow
def test_a_dialogue_judges_each_turn_by_itself(nano):
    session, found = nano.session(seed=0), []
    for turn in (QUESTION, FOREIGN[0], QUESTION):
        *_, last = session.stream(turn)
        found.append(last)
    bound = nano.lm.config.calibration("spoken_dialogue").warns_below
    assert [chunk.warning is not None for chunk in found] == [False, True, False]
    assert [chunk.confidence < bound for chunk in found] == [False, True, False]


def test_without_a_recording_or_a_calibration_there_is_none(nano):
    *_, said = nano.stream("tts", "seven", max_new_tokens=20)
    assert said.confidence is said.warning is None
    text = asked(nano, None).asr_sft(WORDS[0])
    assert text.confidence is text.warning is None
    other = asked(nano, replace(SURE, task="spoken_dialogue")).asr_sft(WORDS[0])
    assert other.confidence is None
    assert text == other
    prompt = nano.get_asr_sft_prompt(WORDS[0])
    assert nano.forward(prompt, task_name="asr", max_new_tokens=5).confidence is None, "ids alone"
    kit = LMConfig.from_dict(json.loads((KIT / "checkpoint/lm/config.json").read_text()))
    assert kit.confidence == kit.reply_limits == ()


def test_sentences_outside_the_domain_are_the_least_certain(nano):
    """The card says how many of many are warned of."""
    found = [nano.asr_sft(recording) for recording in FOREIGN]
    known = [nano.asr_sft(recording) for recording in WORDS]
    assert max(text.confidence for text in found) < min(text.confidence for text in known)
    assert not any(text.warning for text in known)
    bound = nano.lm.config.calibration("asr").warns_below
    assert [text.warning is not None for text in found] == [
        text.confidence < bound for text in found
    ]
    assert any(text.warning for text in found)


@pytest.mark.slow
def test_words_of_the_domain_are_not_warned_of(nano):
    warned = [path.stem for path in WORDS if nano.asr_sft(path).warning is not None]
    assert len(warned) <= 1, warned


def test_a_reply_ends_where_its_recording_gives_no_more_to_say(nano):
    limits = {task: rest for task, *rest in nano.lm.config.reply_limits}
    assert nano.lm.config.longest_reply("asr", 25) == limits["asr"][0] + 4 * limits["asr"][1]
    assert nano.lm.config.longest_reply("tts", 25) is None
    tight = asked(nano, nano.lm.config.calibration("asr"))
    tight.lm.config = replace(tight.lm.config, reply_limits=(("asr", 3.0, 0.0),))
    text = tight.asr_sft(WORDS[1])
    # The group that a reply ends with is no part of it.
    assert (len(text.split()), text.finish_reason) == (2, "length")
    assert tight.asr_sft(WORDS[1], max_new_tokens=60).finish_reason == "stop", "as it was asked for"


@pytest.mark.slow
def test_a_long_recording_that_it_does_not_know_ends(nano):
    wav = mimo_fast.load_audio(FOREIGN[0], 24000).repeat(8)
    text = nano.asr_sft(wav)
    assert len(text.split()) <= 16 + 5 * len(wav) / 24000
    assert text.warning is not None


def complaint(**changes: object) -> str:
    raw = json.loads((NANO / "lm" / "config.json").read_text(encoding="utf-8"))
    return fault(lambda: LMConfig.from_dict(raw | changes), ConfigError)


def test_calibrations_are_checked():
    whole = {"entropy": 0, "surprise": 0, "loss": 0, "bias": 0, "warns_below": 0.5}
    raw = json.loads((NANO / "lm" / "config.json").read_text(encoding="utf-8"))
    config = LMConfig.from_dict(raw | {"confidence": {"asr": whole}})
    assert config.confidence == (Calibration("asr", 0.0, 0.0, 0.0, 0.0, 0.5),)
    for wrong in ([], "x", {"asr": 1}, {"asr": {"bias": 1}}, {"asr": whole | {"bias": "1"}}):
        assert "'confidence' must be" in complaint(confidence=wrong)
    assert "must be between" in complaint(confidence={"asr": whole | {"bias": math.nan}})
    for wrong in ({"asr": 3}, {"asr": [1]}, {"asr": [1, True]}, [1]):
        assert "'reply_limits' must be" in complaint(reply_limits=wrong)
    assert "must be between" in complaint(reply_limits={"asr": [-1, 2]})
