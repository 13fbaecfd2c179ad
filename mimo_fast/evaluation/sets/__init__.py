"""The evaluation sets, by the name that the command knows them by."""

from __future__ import annotations

from mimo_fast.evaluation.items import EvaluationSet
from mimo_fast.evaluation.sets.big_bench_audio import BIG_BENCH_AUDIO
from mimo_fast.evaluation.sets.conversion import CONVERSION_SETS
from mimo_fast.evaluation.sets.mmau import QUESTION_SETS
from mimo_fast.evaluation.sets.mmsu import MMSU
from mimo_fast.evaluation.sets.speech_mmlu import SPEECH_MMLU
from mimo_fast.evaluation.sets.words import WORD_SETS

ALL = (*WORD_SETS, *QUESTION_SETS, MMSU, SPEECH_MMLU, BIG_BENCH_AUDIO, *CONVERSION_SETS)

SETS: dict[str, EvaluationSet] = {each.name: each for each in ALL}
