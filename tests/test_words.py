"""End to end, with the small model that is shipped: words in, words out, by ears that are not its
own where it speaks.

What it hears are recordings of flite's voice rms, which its training never heard;
`tests/words/make.py` made them.
"""

import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import slow_after
from torch import Tensor

import mimo_fast
from mimo_fast.mimo_audio import MimoAudio
from training import domain
from training.listen import recognise, word_error_rate

WORDS = Path(__file__).parent / "words"
SENTENCES, QUESTIONS = (
    [line for line in (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line]
    for name in ("sentences", "questions")
)

WRONG = 0.05
"""Share of words that may be wrong in what it says, and in what it hears."""

formats = pytest.mark.parametrize("quantization", slow_after(1, [None, "int8", "int4"]), ids=str)


@cache
def nano(quantization: str | None) -> MimoAudio:
    return mimo_fast.load(device="cpu", quantization=quantization)


def recording(text: str) -> Path:
    return WORDS / f"{text.replace(' ', '_')}.flac"


def streamed(model: MimoAudio, task: str, request: object, seed: int) -> tuple[Tensor, str]:
    chunks = [*model.stream(task, request, seed=seed, max_new_tokens=120)]
    wav = torch.cat([chunk.audio for chunk in chunks])
    return wav, "".join(chunk.text for chunk in chunks).strip()


def understood(quantization: str | None, sound: Tensor | Path) -> str:
    return nano(quantization).asr_sft(sound, seed=0, max_new_tokens=60)


@cache
def said(quantization: str | None) -> list[Tensor]:
    return [streamed(nano(quantization), "tts", text, i)[0] for i, text in enumerate(SENTENCES)]


def test_none_of_the_sentences_was_trained_on():
    assert all(domain.is_held_out(text) for text in SENTENCES)
    assert all(text in domain.dialogue() for text in QUESTIONS)


@formats
def test_what_it_says_is_understood_by_another_recogniser(quantization):
    heard = [recognise(wav, nano(quantization).codec.sample_rate) for wav in said(quantization)]
    assert word_error_rate(heard, SENTENCES) <= WRONG, heard


@formats
def test_what_it_says_fits_into_a_file(quantization):
    peaks = [float(wav.abs().max()) for wav in said(quantization)]
    assert all(0.1 < peak <= 1 for peak in peaks), peaks


@formats
def test_what_it_says_is_understood_by_itself(quantization):
    heard = [understood(quantization, wav) for wav in said(quantization)]
    assert word_error_rate(heard, SENTENCES) <= WRONG, heard


@formats
def test_it_understands_a_voice_it_has_never_heard(quantization):
    heard = [understood(quantization, recording(text)) for text in SENTENCES]
    assert word_error_rate(heard, SENTENCES) <= WRONG, heard


@formats
def test_it_answers_a_spoken_question_by_voice(quantization):
    model, answers = nano(quantization), [domain.dialogue()[text] for text in QUESTIONS]
    recordings = [recording(text) for text in QUESTIONS]
    replies = [streamed(model, "spoken_dialogue", wav, i) for i, wav in enumerate(recordings)]
    heard = [recognise(wav, model.codec.sample_rate) for wav, _ in replies]
    assert word_error_rate([text for _, text in replies], answers) <= WRONG, replies
    assert word_error_rate(heard, answers) <= WRONG, heard


@formats
def test_streams_of_one_batch_say_what_each_would_say_alone(quantization):
    model, found = nano(quantization), dict[int, Tensor]()

    def speak(i: int) -> None:
        found[i] = streamed(model, "tts", SENTENCES[i], i)[0]

    threads = [threading.Thread(target=speak, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heard = [recognise(found[i], model.codec.sample_rate) for i in range(4)]
    alone = [recognise(wav, model.codec.sample_rate) for wav in said(quantization)[:4]]
    assert word_error_rate(heard, alone) <= WRONG


@pytest.mark.slow
def test_speech_decoded_at_once_has_the_words_of_streamed_speech(tmp_path):
    model, heard = nano(None), list[str]()
    for i, text in enumerate(SENTENCES):
        model.tts_sft(text, tmp_path / "said.wav", seed=i, max_new_tokens=120)
        wav = mimo_fast.load_audio(tmp_path / "said.wav", model.codec.sample_rate)
        heard.append(recognise(wav, model.codec.sample_rate))
    streamed_words = [recognise(wav, model.codec.sample_rate) for wav in said(None)]
    assert word_error_rate(heard, streamed_words) <= WRONG, heard


def pieces_of(wav: Tensor) -> list[Tensor]:
    """Speech between pauses of digital silence, which are put between sentences alone."""
    silent = torch.cat((torch.zeros(1), (wav == 0).float(), torch.zeros(1)))
    runs = silent.diff().nonzero()[:, 0].view(-1, 2).tolist()
    cuts = [edge for start, stop in runs if stop - start >= 2000 for edge in (start, stop)]
    bounds = zip([0, *cuts[1::2]], [*cuts[::2], len(wav)], strict=True)
    return [wav[start:stop] for start, stop in bounds]


def test_several_sentences_are_said_whole_where_one_pass_loses_them():
    model, texts = nano(None), SENTENCES[:4]
    text = ". ".join(texts) + "."
    chunks = [*model.stream("tts", text, seed=0, split=True)]
    wav, rate = torch.cat([chunk.audio for chunk in chunks]), model.codec.sample_rate
    heard = [recognise(piece, rate) for piece in pieces_of(wav)]
    assert word_error_rate(heard, texts) <= WRONG, heard
    assert "".join(chunk.text for chunk in chunks).split() == " ".join(texts).split()
    whole, _ = streamed(model, "tts", text, 0)
    assert len(whole) < len(wav) / 2


def test_where_sentences_meet_nothing_clicks():
    model, texts = nano(None), SENTENCES[:4]
    chunks = model.stream("tts", ". ".join(texts), seed=0, split=True)
    wav = torch.cat([chunk.audio for chunk in chunks])
    alone = [torch.cat([c.audio for c in model.stream("tts", text, seed=0)]) for text in texts]
    assert len(pieces_of(wav)) == len(texts)
    # Twice as long as a piece fades for.
    edges = [edge for piece in pieces_of(wav) for edge in (piece[:480], piece[-480:])]
    inside = min(float(piece.diff().abs().max()) for piece in alone)
    assert max(float(edge.diff().abs().max()) for edge in edges) < inside / 10
    assert max(float(edge[0].abs()) for edge in edges[2::2]) < inside / 100
    assert float(wav.diff().abs().max()) <= max(float(piece.diff().abs().max()) for piece in alone)


@pytest.mark.slow
def test_forty_sentences_are_said_whole():
    model = nano(None)
    texts = [SENTENCES[i % len(SENTENCES)] for i in range(40)]
    chunks = [*model.stream("tts", ". ".join(texts) + ".", seed=0, split=True)]
    wav, rate = torch.cat([chunk.audio for chunk in chunks]), model.codec.sample_rate
    heard = [recognise(piece, rate) for piece in pieces_of(wav)]
    assert len(heard) == 40
    assert word_error_rate(heard, texts) <= WRONG, heard
    assert chunks[-1].finish_reason == "stop"


def test_styles_are_heard():
    model = nano(None)

    def seconds(instruct: str) -> float:
        chunks = [*model.stream("tts", SENTENCES[0], instruct, seed=0, max_new_tokens=160)]
        return chunks[-1].timing.audio_seconds

    assert seconds("speak slowly") > 1.2 * seconds("speak fast")
