"""The evaluation sets, by the name that the command knows them by."""

from __future__ import annotations

from mimo_fast.evaluation.items import EvaluationSet

SETS: dict[str, EvaluationSet] = {}
