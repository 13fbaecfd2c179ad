"""Words wrong in an utterance."""

from __future__ import annotations

import string

from mimo_fast.errors import EvaluationError


def word_errors(reference: str, heard: str, language: str) -> tuple[int, int]:
    """Words to insert, delete or replace, and words of the reference; of Chinese characters."""
    try:
        import jiwer
    except ImportError as error:
        raise EvaluationError(
            f"rates of words need {error.name}: pip install 'mimo-fast[eval]'"
        ) from error
    want, got = (_plain(text, language) for text in (reference, heard))
    if not want:
        return len(got.split()), 0
    found = jiwer.process_words(want, got)
    return found.substitutions + found.deletions + found.insertions, len(want.split())


def _plain(text: str, language: str) -> str:
    kept = text.lower().translate(str.maketrans("", "", string.punctuation.replace("'", "")))
    return " ".join(kept if language == "zh" else kept.split())
