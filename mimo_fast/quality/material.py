"""Recordings with their words, and texts: what formats are compared on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.paths import name_of
from mimo_fast.errors import EvaluationError

SAMPLE_RATE = 24_000


@dataclass(frozen=True)
class Recording:
    """Speech [n] at 24 kHz, and its words where they are known."""

    path: Path
    wav: Tensor
    words: str | None

    @property
    def seconds(self) -> float:
        return len(self.wav) / SAMPLE_RATE


def read_recordings(paths: Sequence[Path], table: Path | None = None) -> list[Recording]:
    """Recordings with their words: those of a table, else of the .txt file beside a recording.

    Raises:
        AudioError: one cannot be read.
        EvaluationError: a file of words cannot be read, or the table names another recording.
    """
    known = read_words(table) if table is not None else {}
    names = {path.name for path in paths} | {path.stem for path in paths}
    if table is not None and (strange := sorted(known.keys() - names)):
        raise EvaluationError(f"{name_of(table)} has words of {strange[0]}, which is not given")
    return [Recording(path, load_audio(path, SAMPLE_RATE), _words(path, known)) for path in paths]


def read_words(table: Path) -> dict[str, str]:
    """A file with a line a recording: its name with or without the suffix, a tab, its words.

    Raises:
        EvaluationError: it cannot be read, or a line is of another form.
    """
    found = dict[str, str]()
    for number, line in enumerate(_text(table).splitlines(), 1):
        name, tab, words = line.partition("\t")
        if line.strip() and not (tab and words.strip()):
            problem = "is not a recording's name, a tab and its words"
            raise EvaluationError(f"line {number} of {name_of(table)} {problem}")
        if line.strip():
            found[name.strip()] = words.strip()
    return found


def _words(path: Path, known: Mapping[str, str]) -> str | None:
    listed = known.get(path.name, known.get(path.stem))
    if listed is not None:
        return listed
    beside = path.with_suffix(".txt")
    return (_text(beside).strip() or None) if beside.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise EvaluationError(f"cannot read {name_of(path)}: {reason}") from error
