"""Errors in words and characters: MiMo-Audio-Eval's normalisation, rates of utterances and corpus.

MiMo-Audio-Eval (`asr_evaluator.py`, `tts_evaluator.py`) counts with jiwer: words in English,
characters in Chinese, and reports the mean of the utterances' rates. The rate of the corpus, all
errors over all words of the references, is what other reports give, and is beside it.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.items import Answer, Figure, Found, Tools

WHISPER = "whisper"
"""The second normaliser: that of the Whisper report, by the package whisper-normalizer."""

RATES = {"en": "WER", "zh": "CER"}
"""What a rate of errors is called, by language; MiMo-Audio-Eval calls both WER."""

MEAN, CORPUS = "mean of utterances", "corpus"


def mean_rate(language: str) -> str:
    """The name of the figure that MiMo-Audio-Eval reports."""
    return f"{RATES[language]}, {MEAN}"


def evaluation_package(name: str) -> Any:
    """A package of the extra `eval`, imported.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        # What a package tells its own makers while it is imported.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except ImportError as error:
        needed = name.partition(".")[0]
        raise EvaluationError(
            f"this needs the package {needed}: pip install 'mimo-fast[eval]'"
        ) from error


def normalise(text: str, language: str) -> str:
    """Text as MiMo-Audio-Eval compares it; words, or in Chinese characters, between blanks.

    Punctuation of zhon and of `string` goes, but for the apostrophe; two blanks become one, once;
    English is in lower case.

    Raises:
        EvaluationError: it does not know the language.
    """
    if language not in RATES:
        raise EvaluationError(f"rates of words are known in en and zh, not in {language!r:.20}")
    text = text.translate(_punctuation()).replace("  ", " ")
    return " ".join(text) if language == "zh" else text.lower()


def normalise_as_whisper(text: str, language: str) -> str:
    """Text as the Whisper report compares it: spellings, numbers and contractions made one.

    In Chinese every character is a word.
    """
    return str(_whisper(language)(text)).strip()


@cache
def _punctuation() -> dict[int, None]:
    found = {*evaluation_package("zhon.hanzi").punctuation, *string.punctuation} - {"'"}
    return {ord(each): None for each in found}


@cache
def _whisper(language: str) -> Callable[[str], str]:
    if language == "en":
        found = evaluation_package("whisper_normalizer.english").EnglishTextNormalizer()
    else:
        package = evaluation_package("whisper_normalizer.basic")
        found = package.BasicTextNormalizer(split_letters=True)
    normaliser: Callable[[str], str] = found
    return normaliser


@dataclass(frozen=True)
class Errors:
    """Words of a hypothesis against those of its reference, by jiwer.

    Attributes:
        words: Of the reference.
        rate: Of this utterance. Of an empty reference jiwer counts the insertions; MiMo-Audio-Eval,
            with jiwer 3, raises there.
    """

    substitutions: int
    deletions: int
    insertions: int
    words: int
    rate: float

    @property
    def count(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def errors_of(reference: str, hypothesis: str) -> Errors:
    """Errors of a hypothesis, both normalised."""
    found = evaluation_package("jiwer").process_words(reference, hypothesis)
    counts = found.substitutions, found.deletions, found.insertions
    words = found.hits + found.substitutions + found.deletions
    return Errors(*counts, words, float(found.wer))


def rates(pairs: Sequence[tuple[str, str]], language: str) -> tuple[float, float, list[Errors]]:
    """Mean of the utterances' rates, rate of the corpus, and the errors of each.

    pairs: reference and hypothesis, normalised; one at least.

    A corpus whose references are all empty has the rate of its insertions, as jiwer's utterance.
    """
    found = [errors_of(*pair) for pair in pairs]
    words, wrong = sum(each.words for each in found), sum(each.count for each in found)
    return sum(each.rate for each in found) / len(found), wrong / (words or 1), found


@dataclass(frozen=True)
class Words:
    """Rates of words: of the reply's text, or of what a recogniser hears in its speech.

    Items have the truth "text", and "language", en or zh.

    Args:
        heard: whether the reply is speech.
        language: that all items have.
        normaliser: `WHISPER` for its rows beside MiMo-Audio-Eval's.
    """

    language: str
    heard: bool = False
    normaliser: str | None = None

    @property
    def name(self) -> str:
        return "words heard" if self.heard else "words"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"recogniser"} if self.heard else ())

    def find(self, answer: Answer, tools: Tools) -> Found:
        """{"reference", "hypothesis"}; an answer that failed, or says nothing, has no words."""
        hypothesis = answer.text
        if self.heard:
            hypothesis = ""
            if answer.audio is not None:
                assert tools.recogniser is not None
                hypothesis = tools.recogniser(answer.audio, self.language).strip()
                hypothesis = _simplified(hypothesis) if self.language == "zh" else hypothesis
        else:
            # The model transcribes dialects with a translation in brackets behind.
            hypothesis = hypothesis.split("(")[0]
        return {"reference": str(answer.item.truth["text"]), "hypothesis": hypothesis}

    def figures(self, found: Sequence[tuple[Answer, Found]]) -> Mapping[str, Figure]:
        """Mean of utterances and corpus, for each normaliser."""
        figures = dict[str, Figure]()
        normalisers = {"": normalise}
        if self.normaliser == WHISPER:
            normalisers[f", {WHISPER}'s normaliser"] = normalise_as_whisper
        for suffix, normaliser in normalisers.items():
            pairs = [
                (
                    normaliser(each["reference"], self.language),
                    normaliser(each["hypothesis"], self.language),
                )
                for _, each in found
            ]
            figures |= self._figures(suffix, pairs)
        return figures

    def _figures(self, suffix: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Figure]:
        mean, corpus, each = rates(pairs, self.language)
        kinds = "substitutions", "deletions", "insertions"
        counts = [f"{sum(getattr(one, kind) for one in each)} {kind}" for kind in kinds]
        note = f"{', '.join(counts)}, of {sum(one.words for one in each)}"
        label = RATES[self.language]
        if empty := sum(not one.words for one in each):
            note += f"; {empty} empty references, of which each insertion counts as one word"
        return {
            f"{label}, {MEAN}{suffix}": Figure(100 * mean, "%", len(each), "lower"),
            f"{label}, {CORPUS}{suffix}": Figure(100 * corpus, "%", len(each), "lower", note),
        }


def _simplified(text: str) -> str:
    """A recogniser's Chinese in simplified characters, as MiMo-Audio-Eval compares it."""
    return str(evaluation_package("zhconv").convert(text, "zh-cn"))
