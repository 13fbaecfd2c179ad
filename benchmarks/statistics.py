"""Whether one of two versions is faster, from times measured in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99
"""Many ops are compared at once: at 95% every twentieth would seem to differ."""

RESAMPLES = 5000


@dataclass(frozen=True)
class Comparison:
    """The median over pairs of new time / old time, and its confidence interval."""

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """What the interval shows; none is shown while it holds 1."""
        if self.low > 1:
            return "slower"
        return "faster" if self.high < 1 else "no difference shown"

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


def compare(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Comparison:
    """Of (old, new) seconds, each pair measured one right after the other.

    The interval is a percentile bootstrap over pairs. What a machine does to both times of a pair
    alike cancels in their ratio; a median leaves what it does to one of them without effect.

    Raises:
        ValueError: there are no pairs, or a time is not positive.
    """
    if not pairs or min(min(pair) for pair in pairs) <= 0:
        raise ValueError("a comparison needs pairs of positive times")
    ratios = np.log([new / old for old, new in pairs])
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Comparison(*(float(np.exp(x)) for x in (np.median(ratios), low, high)), len(ratios))
