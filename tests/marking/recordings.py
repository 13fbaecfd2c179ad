"""Sentences by flite's voices, as recordings that are marked or not."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from benchmarks.transformations import RATE
from mimo_fast.audio.files import load_audio

WORDS = Path(__file__).parents[1] / "words"


def sentences(every: int = 1) -> Iterator[Tensor]:
    """Each or some of the sentences [n] at 24 kHz."""
    for path in sorted(WORDS.glob("*.flac"))[::every]:
        yield load_audio(path, RATE)
