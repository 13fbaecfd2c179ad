"""Where words lie in a recording, and how many of them are wrong."""

import itertools

import pytest
import torch
from torch import Tensor

from training.alignment import best_path, spoken_words
from training.listen import word_error_rate, word_errors


def test_the_best_path_is_the_best_of_all():
    def likeliest(scores: Tensor, words: list[int]) -> float:
        best = -float("inf")
        for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
            collapsed = [label for i, label in enumerate(path) if label and (not i or path[i - 1] != label)]
            if collapsed == words:
                best = max(best, float(scores[range(len(path)), path].sum()))
        return best

    generator = torch.Generator().manual_seed(0)
    for words in ([1, 2], [2, 2], [1], [1, 2, 1]):
        scores = torch.randn(6, 3, generator=generator).log_softmax(-1)
        places = best_path(scores, words, blank=0)
        # The best of all paths that first emit the words at those places.
        limited = -float("inf")
        for path in itertools.product(range(3), repeat=6):
            runs = [i for i, label in enumerate(path) if label and (not i or path[i - 1] != label)]
            if runs == places and [path[i] for i in runs] == words:
                limited = max(limited, float(scores[range(6), path].sum()))
        assert limited == pytest.approx(likeliest(scores, words), abs=1e-5)
    assert best_path(torch.zeros(3, 3), [1, 1, 1, 1], blank=0) == [0, 0, 1, 2], "too short: spread evenly"
    assert spoken_words([1, 3], patches=5, count=2).tolist() == [0, 1, 1, 1, 1]


def test_word_errors_are_counted():
    assert word_errors("one two three", "one two three") == 0
    assert word_errors("one three", "one two three") == 1
    assert word_errors("one too three four", "one two three") == 2
    assert word_error_rate(["", "a b"], ["one two", "a b"]) == 0.5
