"""Where words lie in a recording, and how many of them are wrong."""

import pytest

from training.listen import word_error_rate, word_errors
from training.synthesis import _paces, _Segments, word_places


def test_words_are_found_though_their_phones_change():
    words = [("w", "ah", "n"), ("ey",), ("eh", "g"), ("w", "ah", "n")]
    alone = [phone for word in words for phone in word]
    assert word_places(alone, words) == [0, 3, 4, 6]
    reduced = ["w", "ah", "n", "ax", "eh", "w", "ah", "n"]
    assert word_places(reduced, words) == [0, 3, 4, 5]
    longer = ["w", "ah", "n", "ey", "y", "eh", "g", "w", "ax", "n"]
    assert word_places(longer, words) == [0, 3, 5, 7]
    assert word_places(["w", "ah", "n"], words)[-1] <= 2, "words that are not there lie at the end"


def test_words_are_paced_to_begin_on_a_grid():
    # Two words of 0.13 s and 0.25 s with a pause of 0.07 s between them.
    found = _Segments(["a", "b", "c"], [0, 2], [0.2, 0.25, 0.4], [0.25, 0.33, 0.65])
    first, last = _paces(found, 0.04)
    assert first == pytest.approx(0.13 / (0.2 - 0.07))
    assert last == pytest.approx(0.25 / 0.24)
    short = _paces(_Segments(["a"], [0], [0.0], [0.01]), 0.04)
    assert short == [pytest.approx(0.25)], "a word takes one step at least"


def test_word_errors_are_counted():
    assert word_errors("one two three", "one two three") == 0
    assert word_errors("one three", "one two three") == 1
    assert word_errors("one too three four", "one two three") == 2
    assert word_error_rate(["", "a b"], ["one two", "a b"]) == 0.5
