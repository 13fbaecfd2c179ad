"""Where words lie in a recording, and how many of them are wrong."""

from training.listen import word_error_rate, word_errors
from training.synthesis import word_places


def test_words_are_found_though_their_phones_change():
    words = [("w", "ah", "n"), ("ey",), ("eh", "g"), ("w", "ah", "n")]
    alone = [phone for word in words for phone in word]
    assert word_places(alone, words) == [0, 3, 4, 6]
    reduced = ["w", "ah", "n", "ax", "eh", "w", "ah", "n"]
    assert word_places(reduced, words) == [0, 3, 4, 5]
    longer = ["w", "ah", "n", "ey", "y", "eh", "g", "w", "ax", "n"]
    assert word_places(longer, words) in ([0, 3, 5, 7], [0, 3, 4, 7])
    assert word_places(["w", "ah", "n"], words)[-1] <= 2, "words that are not there lie at the end"


def test_word_errors_are_counted():
    assert word_errors("one two three", "one two three") == 0
    assert word_errors("one three", "one two three") == 1
    assert word_errors("one too three four", "one two three") == 2
    assert word_error_rate(["", "a b"], ["one two", "a b"]) == 0.5
