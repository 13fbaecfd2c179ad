"""Losses and their intervals, beside resampling that was written for the tests alone."""

import random
import statistics

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_fast.quality.losses import Loss, interval, mean_loss, word_loss

COUNTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=40
)
VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=40)


def resampled(differences: list[float], weights: list[float], rounds: int = 2000) -> list[float]:
    """Ends of the middle 95% of means of utterances that are drawn with replacement."""
    draw, found = random.Random(1), []
    for _ in range(rounds):
        chosen = draw.choices(range(len(weights)), k=len(weights))
        found.append(sum(differences[i] for i in chosen) / sum(weights[i] for i in chosen))
    cuts = statistics.quantiles(found, n=40, method="inclusive")
    return [cuts[0], cuts[-1]]


def test_the_interval_is_that_of_plain_resampling():
    draw = random.Random(0)
    differences = [draw.gauss(0.3, 1) for _ in range(60)]
    weights = [draw.randint(1, 9) for _ in range(60)]
    value, *ends = interval(differences, weights)
    assert value == pytest.approx(sum(differences) / sum(weights))
    # Both have noise of their own: about a hundredth of the interval's width.
    assert ends == pytest.approx(resampled(differences, weights), abs=0.05 * (ends[1] - ends[0]))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw, covered = numpy.random.default_rng(5), 0
    for _ in range(100):
        words = draw.integers(3, 9, 40)
        # The format has a tenth of the words wrong, the full one a twentieth.
        ours, theirs = draw.binomial(words, 0.1), draw.binomial(words, 0.05)
        _, low, high = interval([*(ours - theirs)], [*words])
        covered += low <= 0.05 <= high
    assert 88 <= covered <= 100


@settings(max_examples=50)
@given(VALUES, st.floats(-1, 1))
def test_what_all_utterances_lose_moves_the_whole_interval(differences, more):
    ones = [1] * len(differences)
    before = interval(differences, ones)
    after = interval([each + more for each in differences], ones)
    assert after == pytest.approx([each + more for each in before], abs=1e-9)
    assert min(differences) - 1e-9 <= before[1] <= before[2] <= max(differences) + 1e-9
    assert interval(differences, ones) == before


@settings(max_examples=50)
@given(COUNTS)
def test_a_format_loses_nothing_beside_itself_but_few_words_cannot_show_it(counts):
    errors, _, words = map(list, zip(*counts, strict=True))
    loss = word_loss(errors, errors, words, bound=0.03)
    assert (loss.value, loss.low, loss.high) == (0, 0, pytest.approx(3 / sum(words)))
    enough = sum(words) >= 100 and len(words) >= 10
    assert loss.verdict == ("holds" if enough else "open")
    if loss.verdict == "open":
        # As many times the utterances as are said to be needed do settle it.
        times = -(-loss.needed // len(words))
        more = word_loss(errors * times, errors * times, words * times, 0.03)
        assert more.verdict == "holds"


@settings(max_examples=50)
@given(COUNTS)
def test_word_losses_are_of_all_words_together(counts):
    errors, full, words = map(list, zip(*counts, strict=True))
    loss = word_loss(errors, full, words, 0.03)
    assert loss.value == pytest.approx((sum(errors) - sum(full)) / sum(words))
    assert loss.high >= max(loss.low, 3 / sum(words))
    assert loss.utterances == len(words)


def test_without_words_there_is_no_loss():
    assert word_loss([1], [0], [0], 0.03) is None


def test_utterances_that_were_not_measured_in_both_are_left_out():
    loss = mean_loss([1.0, None, 3.0, 4.0], [2.0, 5.0, None, 4.5], bound=0.1)
    assert (loss.value, loss.utterances) == (0.75, 2)
    assert mean_loss([1.0, None], [2.0, 3.0], 0.1) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.1, 0.03, "holds"), (0.031, 0.2, "broken"), (0.01, 0.031, "open"), (0.03, 0.04, "open")],
)
def test_the_whole_interval_decides(low, high, verdict):
    assert Loss(0.02, low, high, 0.03, 10).verdict == verdict


def test_a_handful_of_utterances_tells_nothing():
    assert word_loss([4] * 9, [0] * 9, [5] * 9, 0.03).verdict == "open"
    assert word_loss([4] * 10, [0] * 10, [5] * 10, 0.03).verdict == "broken"
    assert Loss(0.0, 0.0, 0.02, 0.03, 9).verdict == "open"
    assert Loss(0.0, 0.0, 0.02, 0.03, 9).needed == 10


def test_how_many_utterances_would_settle_it():
    # The end has to come three times as near to the value.
    assert Loss(0.0, -0.09, 0.09, 0.03, 10).needed == 90
    # With no difference seen, the words alone count.
    assert Loss(0.0, 0.0, 0.09, 0.03, 10, least=0.09).needed == 30
    assert Loss(0.05, -0.09, 0.09, 0.03, 10).needed is None
    assert Loss(0.0, -0.01, 0.01, 0.03, 10).needed is None
