"""What a format loses beside the full one: paired differences with a 95% bootstrap interval.

Every utterance is measured in both, so the interval is of their differences: utterances are drawn
with replacement, both measurements of one together (Bisani and Ney, ICASSP 2004, for word errors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 10_000
SEED = 0
CHUNK = 1_000_000
"""Draws held at once."""

LOW, HIGH = 2.5, 97.5

FEWEST = 10
"""Utterances below which nothing is told: resampling so few hardly ever finds what none of them
shows, so that its interval is too narrow."""

RULE_OF_THREE = 3.0
"""Events that may have been expected where none was seen, at 95% (Hanley, JAMA 249, 1983)."""


@dataclass(frozen=True)
class Loss:
    """How much worse a format is, in the measure's own unit; negative where it is better.

    Attributes:
        low, high: Ends of the 95% interval.
        bound: What it may lose.
        utterances: Number of pairs that it is of.
        least: What `high` is at least, as so few words cannot rule it out; 0 for other measures.
    """

    value: float
    low: float
    high: float
    bound: float
    utterances: int
    least: float = 0.0

    @property
    def verdict(self) -> str:
        """Which side of the bound it is on: "holds", "broken" or "open".

        The whole interval has to be, and of FEWEST utterances or more: otherwise these are too few
        to tell.
        """
        if self.utterances < FEWEST:
            return "open"
        if self.high <= self.bound:
            return "holds"
        return "broken" if self.low > self.bound else "open"

    @property
    def needed(self) -> int | None:
        """About how many utterances like these would settle an open loss below its bound.

        The interval shrinks with the root of their number, what the rule of three cannot rule out
        with the number. None for other losses.
        """
        if self.verdict != "open" or self.value >= self.bound:
            return None
        times = self.least / self.bound
        if self.high > self.least:
            times = max(times, ((self.high - self.value) / (self.bound - self.value)) ** 2)
        return max(FEWEST, math.ceil(self.utterances * times))


def word_loss(
    errors: Sequence[int], full: Sequence[int], words: Sequence[int], bound: float
) -> Loss | None:
    """Loss in the word error rate of all utterances together; None where there are no words.

    Where no utterance differs, resampling knows of no uncertainty. So the interval reaches at least
    as far as the rule of three: so many words wrong may have been missed by chance.

    Args:
        errors, full: words wrong in each utterance, in the format and in the full one.
        words: in each utterance's reference.
    """
    if not sum(words):
        return None
    differences = [ours - theirs for ours, theirs in zip(errors, full, strict=True)]
    value, low, high = interval(differences, words)
    least = RULE_OF_THREE / sum(words)
    return Loss(value, low, max(high, least), bound, len(words), least)


def mean_loss(
    values: Sequence[float | None], full: Sequence[float | None], bound: float
) -> Loss | None:
    """Loss in the mean of what is better the higher it is.

    Utterances that either could not be measured in are left out; None where fewer than two remain,
    of which there is no interval.
    """
    pairs = zip(values, full, strict=True)
    kept = [theirs - ours for ours, theirs in pairs if ours is not None and theirs is not None]
    if len(kept) < 2:
        return None
    return Loss(*interval(kept, [1] * len(kept)), bound, len(kept))


def interval(differences: Sequence[float], weights: Sequence[float]) -> tuple[float, float, float]:
    """Sum of the differences over the sum of the weights, and the ends of its 95% interval.

    The same numbers have the same interval: the draws have a fixed seed. Draws whose weights are
    all zero are left out.
    """
    gained, weighed = numpy.asarray(differences, float), numpy.asarray(weights, float)
    count, draw = len(gained), numpy.random.default_rng(SEED)
    rows, found = max(1, CHUNK // count), list[numpy.ndarray]()
    for first in range(0, RESAMPLES, rows):
        chosen = draw.integers(count, size=(min(rows, RESAMPLES - first), count))
        sums, totals = gained[chosen].sum(1), weighed[chosen].sum(1)
        found.append(sums[totals > 0] / totals[totals > 0])
    low, high = numpy.percentile(numpy.concatenate(found), (LOW, HIGH))
    return float(gained.sum() / weighed.sum()), float(low), float(high)
