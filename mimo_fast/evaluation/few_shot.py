"""Examples in front of a question, for base models, drawn as MiMo-Audio-Eval draws them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from mimo_fast.errors import EvaluationError

Drawn = TypeVar("Drawn")


def drawn_examples(
    rows: Sequence[Drawn], shots: int, seed: int, *, fewer: bool = False
) -> Iterator[list[Drawn]]:
    """For each row `shots` of the others, by one generator for all, row after row.

    These are the draws of MiMo-Audio-Eval with one process. With eight, as its scripts start them,
    each has the seed for itself and draws from the rows of its own share (MMAU and MMAR) or for
    them alone (speech to speech); and a run that resumes begins its draws anew.

    Args:
        fewer: takes as many as there are, where they are fewer.

    Raises:
        EvaluationError: there are fewer rows, and that many were asked for.
    """
    if shots > len(rows) - 1 and not fewer:
        raise EvaluationError(
            f"{len(rows)} items leave no {shots} examples for each: use fewer shots"
        )
    generator = random.Random(seed)
    for i in range(len(rows)):
        others = [*rows[:i], *rows[i + 1 :]]
        yield generator.sample(others, min(shots, len(others)))
