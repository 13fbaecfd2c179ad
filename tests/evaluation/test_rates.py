"""Rates of words: MiMo-Audio-Eval's normalisation and jiwer, against counting by hand."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zhon.hanzi import punctuation

from mimo_fast import MimoFastError
from mimo_fast.evaluation.items import Answer, Item, Tools
from mimo_fast.evaluation.rates import (
    Errors,
    Words,
    errors_of,
    mean_rate,
    normalise,
    normalise_as_whisper,
    rates,
)

WORD = st.text("ab'", min_size=1, max_size=3)
SENTENCE = st.lists(WORD, max_size=4).map(" ".join)
ANY = st.text(st.sampled_from("aB ' ,.?!，。你好 (-"), max_size=30)


def as_upstream(text, language):
    """MiMo-Audio-Eval's steps, one after the other (`ASREvaluator.wer`)."""
    for mark in punctuation + string.punctuation:
        if mark != "'":
            text = text.replace(mark, "")
    text = text.replace("  ", " ")
    return " ".join(list(text)) if language == "zh" else text.lower()


def distance(a, b):
    """Fewest words to insert, delete or replace."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


@given(ANY, st.sampled_from(["en", "zh"]))
def test_normalisation_is_upstreams(text, language):
    assert normalise(text, language) == as_upstream(text, language)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Don't  stop, please!", "en", "don't stop please"),
        ("four    blanks", "en", "four  blanks"),
        ("今天，天气好。", "zh", "今 天 天 气 好"),
        ("A b", "zh", "A   b"),
        ("", "en", ""),
    ],
)
def test_normalised_by_hand(text, language, expected):
    assert normalise(text, language) == expected


def test_a_language_that_is_not_known():
    with pytest.raises(MimoFastError, match="en and zh, not in 'fr'"):
        normalise("bonjour", "fr")


def test_whispers_normaliser():
    assert normalise_as_whisper("It's twenty-one, Mr. Smith", "en") == "it is 21 mister smith"
    assert normalise_as_whisper("你好，世界", "zh") == "你 好 世 界"


@given(SENTENCE, SENTENCE)
def test_errors_are_the_fewest(reference, hypothesis):
    found = errors_of(reference, hypothesis)
    words = reference.split()
    assert found.words == len(words)
    assert found.count == distance(tuple(words), tuple(hypothesis.split()))
    assert found.rate == pytest.approx(found.count / (len(words) or 1))


@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=4))
def test_mean_and_corpus(pairs):
    counts = [(distance(tuple(a.split()), tuple(b.split())), len(a.split())) for a, b in pairs]
    mean, corpus, found = rates(pairs, "en")
    assert mean == pytest.approx(sum(wrong / (n or 1) for wrong, n in counts) / len(pairs))
    total = sum(n for _, n in counts)
    assert corpus == pytest.approx(sum(wrong for wrong, _ in counts) / (total or 1))
    assert [each.words for each in found] == [n for _, n in counts]


def test_kinds_of_errors():
    assert errors_of("a b c", "a x c d") == Errors(1, 0, 1, 3, pytest.approx(2 / 3))
    assert errors_of("a b", "") == Errors(0, 2, 0, 2, 1.0)
    # jiwer 3, which MiMo-Audio-Eval has, raises here.
    assert errors_of("", "a b") == Errors(0, 0, 2, 0, 2.0)
    assert errors_of("", "") == Errors(0, 0, 0, 0, 0.0)


def answer(text, reference, error=None, audio=None):
    item = Item("1", {}, {"text": reference, "language": "en"})
    return Answer(item, text, audio, error=error)


def test_transcripts_end_at_a_bracket():
    words = Words("en")
    found = [
        (each, words.find(each, Tools()))
        for each in (answer("Good night (gute Nacht)", "good night"), answer("", "a b", "failed"))
    ]
    assert [each["hypothesis"] for _, each in found] == ["Good night ", ""]
    figures = words.figures(found)
    assert figures[mean_rate("en")].value == pytest.approx(50)
    assert figures["WER, corpus"].value == pytest.approx(50)
    assert figures["WER, corpus"].note == "0 substitutions, 2 deletions, 0 insertions, of 4"


def test_speech_is_heard(tmp_path):
    words, heard = Words("en", heard=True), []

    def recogniser(audio, language):
        heard.append((audio, language))
        return " Hello (there) "

    tools = Tools(recogniser=recogniser)
    assert words.find(answer("ignored", "hello"), tools)["hypothesis"] == ""
    spoken = answer("ignored", "hello", audio=tmp_path / "1.wav")
    assert words.find(spoken, tools)["hypothesis"] == "Hello (there)"
    assert heard == [(tmp_path / "1.wav", "en")]


def test_whispers_rows_are_beside():
    words = Words("en", normaliser="whisper")
    figures = words.figures([(answer("", ""), {"reference": "colour", "hypothesis": "color"})])
    assert figures["WER, mean of utterances"].value == 100
    assert figures["WER, mean of utterances, whisper's normaliser"].value == 0


def test_empty_references_are_noted():
    figures = Words("en").figures([(answer("", ""), {"reference": "...", "hypothesis": "a b"})])
    assert figures["WER, mean of utterances"].value == 200
    assert "1 empty references" in figures["WER, corpus"].note


def test_a_recognisers_chinese_is_simplified_before_it_is_compared(recwarn):
    words = Words("zh", heard=True)
    said = Answer(Item("1", {}, {"text": "汉语", "language": "zh"}), audio=Path("said.wav"))
    found = words.find(said, Tools(recogniser=lambda audio, language: " 漢語 "))
    assert found == {"reference": "汉语", "hypothesis": "汉语"}
    assert words.figures([(said, found)])["CER, corpus"].value == 0
    # What the package says of its own imports is not the user's.
    assert not [each for each in recwarn if "pkg_resources" in str(each.message)]
