"""Words, voice and sound of recordings and of what was said."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm

from mimo_fast.audio.files import load_audio
from mimo_fast.errors import AudioError
from mimo_fast.evaluation.rates import errors_of, normalise
from mimo_fast.evaluation.voices import RATE, Resemblyzer, dnsmos

Files = Sequence[Path | None]


def words_of(heard: Sequence[str], references: Sequence[str], language: str) -> dict[str, Any]:
    """Words wrong in each utterance, words of each reference, and the rate of all together.

    In Chinese characters. Both are normalised as MiMo-Audio-Eval does.
    """
    found = [
        errors_of(normalise(want, language), normalise(got, language))
        for got, want in zip(heard, references, strict=True)
    ]
    errors, words = [each.count for each in found], [each.words for each in found]
    rate = sum(errors) / sum(words) if sum(words) else None
    return {"rate": rate, "errors": errors, "words": words, "heard": [*heard]}


def embeddings(files: Files, encoder: Resemblyzer, title: str) -> list[Any]:
    """The voice of each file; None where there is none."""
    return [_or_none(encoder, file) for file in _shown(files, f"voices of {title}")]


def likeness(voices: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
    """Cosine of each voice and its reference; None where either is missing."""
    pairs = zip(voices, references, strict=True)
    return _summary([None if a is None or b is None else float(a @ b) for a, b in pairs])


def closeness(ours: Sequence[Any], theirs: Sequence[Any], same: bool) -> float | None:
    """Mean cosine of all pairs; `same`: of different ones of one set."""
    found = [
        float(a @ b)
        for i, a in enumerate(ours)
        for k, b in enumerate(theirs)
        if a is not None and b is not None and not (same and i >= k)
    ]
    return statistics.fmean(found) if found else None


def others(voices: Sequence[Any]) -> list[Any]:
    """For each voice the mean direction of the others; None where there are no others."""
    found = list[Any]()
    for i in range(len(voices)):
        rest = [each for k, each in enumerate(voices) if k != i and each is not None]
        mean = numpy.mean(rest, axis=0) if rest else None
        found.append(None if mean is None else mean / numpy.linalg.norm(mean))
    return found


def sound_of(files: Files, title: str) -> dict[str, Any]:
    """DNSMOS of each file: of all scores the mean, of the overall one each."""

    def judged(file: Path) -> dict[str, float]:
        return dnsmos(load_audio(file, RATE), RATE)

    scores = [_or_none(judged, file) for file in _shown(files, f"sound of {title}")]
    known = [each for each in scores if each is not None]
    means = {
        name: statistics.fmean(each[name] for each in known) for name in (known[0] if known else ())
    }
    return _summary([each and each["ovrl"] for each in scores]) | {"scores": means}


def _or_none(measure: Any, file: Path | None) -> Any:
    """None where nothing was said, or nobody speaks."""
    try:
        return None if file is None else measure(file)
    except AudioError:
        return None


def _summary(values: list[float | None]) -> dict[str, Any]:
    known = [each for each in values if each is not None]
    return {"mean": statistics.fmean(known) if known else None, "values": values}


def _shown(files: Files, title: str) -> Any:
    return tqdm(files, desc=title, leave=False, disable=None)
