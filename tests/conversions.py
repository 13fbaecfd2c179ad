"""Examples of conversions for tests: questions in the unheard voice, answers as nano says them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mimo_fast import MimoAudio
from mimo_fast.runtime.examples import Source, write_set

WORDS = Path(__file__).parent / "words"
ANSWERED = {"what_is_three_plus_four": "seven", "what_day_comes_after_friday": "saturday"}
ASKED = WORDS / "what_color_is_the_sea.flac"
ANSWER = "the sea is blue"

Examples = list[tuple[Path, Path, str]]


def answered(nano: MimoAudio, folder: Path) -> Examples:
    """Two questions, their answers, and the words of these."""
    found = Examples()
    for name, words in ANSWERED.items():
        path = folder / f"{words}.wav"
        nano.tts_sft(words, path, seed=1)
        found.append((WORDS / f"{name}.flac", path, words))
    return found


def write_answers(nano: MimoAudio, folder: Path) -> Path:
    """The same as a set."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sources = [Source(*each) for each in answered(nano, folder.parent)]
    write_set(folder, sources, "answer", "Synthesized: nobody is to be asked.")
    for _, path, _ in answered(nano, folder.parent):
        path.unlink()
    return folder


@contextmanager
def encoded(codec: Any) -> Iterator[list[int]]:
    """Samples of each recording that is encoded."""
    found = list[int]()

    def counted(function: Any) -> Any:
        def encode(waves: Any, *arguments: Any, **named: Any) -> Any:
            several = isinstance(waves, Sequence)
            found.extend(len(wav) for wav in (waves if several else [waves]))
            return function(waves, *arguments, **named)

        return encode

    names = "encode", "encode_measured", "encode_together", "encode_measured_together"
    originals = {name: counted(getattr(codec, name)) for name in names}
    with patch.multiple(codec, **originals):
        yield found
