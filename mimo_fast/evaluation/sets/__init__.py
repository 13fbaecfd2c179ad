"""The evaluation sets, by the name that the command knows them by."""

from __future__ import annotations

from mimo_fast.evaluation.items import EvaluationSet
from mimo_fast.evaluation.sets.words import WORD_SETS

SETS: dict[str, EvaluationSet] = {each.name: each for each in (*WORD_SETS,)}
