"""An item of an evaluation set, its answer, and what measures an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Found = Mapping[str, Any]
"""What a measure found of one answer; JSON values."""


@dataclass(frozen=True)
class Item:
    """One request to the model and what is known of its answer.

    Attributes:
        id: Unique in its set; the name of its answer's file.
        arguments: Of the set's task, as `MimoAudio.stream` takes them.
        truth: What its measures need: the reference's text, choices, language, recordings.
        groups: Breakdowns that it is counted in: {"task": "music", "difficulty": "hard"}.
    """

    id: str
    arguments: Mapping[str, Any]
    truth: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the model made of an item.

    Attributes:
        text: Of the reply.
        audio: The reply's file; None where the task has no speech.
        seconds: Of audio.
        error: One line where it failed; it counts as a wrong answer, and is counted apart.
    """

    item: Item
    text: str = ""
    audio: Path | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Figure:
    """A number of a report.

    Attributes:
        value: In `unit`; None where nothing was measured, which `note` explains.
        unit: "%", "" for a score, "s", "dB".
        count: Answers that it is of.
        better: "lower" or "higher".
    """

    value: float | None
    unit: str
    count: int
    better: str
    note: str = ""


class Recogniser(Protocol):
    """Speech -> words. Plug-ins are such functions, or classes made without arguments."""

    def __call__(self, audio: Path, language: str) -> str: ...


class SpeakerEncoder(Protocol):
    """Speech -> an embedding [n] of its voice; voices are compared by the cosine of two."""

    def __call__(self, audio: Path) -> Any: ...


class Judge(Protocol):
    """Messages of a chat -> what the judge says. `audio`: recordings that it hears."""

    def __call__(
        self, messages: Sequence[Mapping[str, str]], audio: Sequence[Path] = ()
    ) -> str: ...


@dataclass(frozen=True)
class Tools:
    """Plug-ins that were given. A measure that needs another is not made, as the report says.

    Attributes:
        names: What each was given as, by its field.
    """

    recogniser: Recogniser | None = None
    speaker: SpeakerEncoder | None = None
    judge: Judge | None = None
    names: Mapping[str, str] = field(default_factory=dict)


class Measure(Protocol):
    """What is found of each answer, and the figures of all.

    `needs` names fields of `Tools`.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def find(self, answer: Answer, tools: Tools) -> Found: ...

    def figures(self, found: Sequence[tuple[Answer, Found]]) -> Mapping[str, Figure]: ...


@dataclass(frozen=True)
class Options:
    """How a set is asked.

    Attributes:
        shots: Examples in front of each question, for base models.
        thinking: Whether the model thinks before it answers, where a set asks for it.
        mode: Way of asking where a set has several: "s2t", "s2s", "t2t", "t2s".
        seed: Of the draws of examples, as MiMo-Audio-Eval's.
        normaliser: "whisper" for rates of words in its normalisation as well.
    """

    shots: int = 0
    thinking: bool = False
    mode: str | None = None
    seed: int = 42
    normaliser: str | None = None


@dataclass(frozen=True)
class Published:
    """A published score: of which model, in the unit of the figure it is printed beside."""

    model: str
    figure: str
    value: float
    source: str
    split: str | None = None
    options: Options | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """A set: how its files are read, which task answers it, what measures the answers.

    Attributes:
        splits: The first is the default.
        task: Of the options: the name of a task of `MimoAudio.stream`.
        read: The folder as it is published (MiMo-Audio-Eval's `data/`, or the set's own folder),
            a split, options -> items. Raises EvaluationError naming the file that is missing or
            wrong, and where it comes from.
        measures: Of the split and the options.
        forms: Files that are read, from `--data` on.
        source: Where they come from.
    """

    name: str
    title: str
    splits: tuple[str, ...]
    task: Callable[[Options], str]
    read: Callable[[Path, str, Options], Sequence[Item]]
    measures: Callable[[str, Options], Sequence[Measure]]
    published: tuple[Published, ...] = ()
    modes: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    source: str = ""
