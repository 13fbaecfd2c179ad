"""Marks survive what happens to a recording on its way; other speech stays other speech.

Where that falls short it says by how much, as docs/responsible-use.md does.
"""

import pytest
import torch
from transformations import CHANGES, RATE, noisy, sentences

import mimo_fast
from mimo_fast.marking.watermark import find_watermark, watermark

TEXTS = (
    *("seven forty two", "the train leaves at nine fifteen", "three hundred and twelve plus five"),
    *("zero one two three four five six seven eight nine", "what is your name"),
)

MARKED = {"opus 12": 0.7, "telephone": 0.94, "noise at 30 dB": 0.5}
"""Least confidence of marked speech where it is below 0.98: of a sentence of about two seconds."""

OTHER = {"opus 24": 0.15, "opus 12": 0.25}
"""Most confidence of other speech where it is above 0.1."""


@pytest.fixture(scope="module")
def voices():
    """Sentences of two synthesizers that have nothing in common, by their names."""
    with mimo_fast.load() as nano:
        said = [nano.stream("tts", text, seed=seed) for seed, text in enumerate(TEXTS)]
        spoken = [torch.cat([chunk.audio for chunk in chunks]) for chunks in said]
    return {"nano": spoken, "flite": list(sentences(3))}


@pytest.fixture(scope="module")
def marked(voices):
    return {name: [watermark(wav, RATE) for wav in said] for name, said in voices.items()}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_marks_survive(marked, change):
    for name, said in marked.items():
        found = [find_watermark(*CHANGES[change](wav)).confidence for wav in said]
        assert min(found) >= MARKED.get(change, 0.98), (name, found)
        if change == "telephone":
            assert sum(each >= 0.98 for each in found) >= len(found) - 1, (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_other_speech_is_not_taken_for_marked(voices, change):
    for name, said in voices.items():
        found = [find_watermark(*CHANGES[change](wav)).confidence for wav in said]
        assert max(found) < OTHER.get(change, 0.1), (name, found)


def test_speech_as_it_is():
    for wav in sentences(6):
        assert find_watermark(wav, RATE).confidence < 0.1
        assert find_watermark(watermark(wav, RATE), RATE).confidence >= 0.98


@pytest.mark.slow
def test_what_marks_do_not_survive(marked):
    """So that nobody believes that they do: noise at 20 dB, in most sentences of nano."""
    found = [find_watermark(*noisy(20)(wav)).confidence for wav in marked["nano"]]
    assert sum(found) / len(found) < 0.5
