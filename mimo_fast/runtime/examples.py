"""Examples of speech to speech: recordings, checked and decoded, and named sets of them.

EXAMPLES/NAME/set.json        instruction, consent note, and the examples: before, after, words
EXAMPLES/NAME/1-before.wav    the recordings that it names

Whatever is wrong with them is said before a model is loaded.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mimo_fast.audio.files import AudioSource, load_audio
from mimo_fast.audio.paths import check_readable, name_of, soundfile_library
from mimo_fast.audio.segments import levelled
from mimo_fast.checkpoint.folder import check_new_folder, new_folder, write_json
from mimo_fast.errors import AudioError, ConfigError, MimoFastError, PromptError
from mimo_fast.json_files import read_json, shown
from mimo_fast.text.few_shot import MAX_EXAMPLES

SECONDS = 30.0
"""Of one recording at most; all of them share the model's context."""

SILENT = 1e-4
"""Peak below which a recording holds nothing but rounding, 3 steps of 16 bits."""

SAMPLE_RATE = 24_000

SET = "set.json"
KEYS = "instruction", "consent", "examples"
PARTS = "before", "after", "words"
TASK_KEYS = "input_audio", "output_audio", "output_transcription"
"""What upstream's task calls the parts of an example."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
"""Of a voice or a set that may be asked for by name; never a path."""

SHORTEST_NOTE, NOTE = 3, 2000
"""Characters of a consent note."""

CONSENT = f"in {SHORTEST_NOTE} to {NOTE} characters who allowed the use of these recordings"

Given = Mapping[str, Any] | Sequence[Any]
"""An example of a caller: (before, after), (before, after, words), or upstream's mapping."""


@dataclass(frozen=True)
class Example:
    """What was said before and after, float32 [n] at 24 kHz, and the words of the latter.

    words: None where they are still to be heard.
    """

    before: Tensor
    after: Tensor
    words: str | None = None


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one conversion.

    Args:
        instruction: what they show, in words or by name; None for the default.
        consent: who allowed that these recordings are used, and for what.
    """

    examples: tuple[Example, ...]
    instruction: str | None = None
    consent: str = ""


@dataclass(frozen=True)
class Source:
    """An example that has not been read."""

    before: AudioSource
    after: AudioSource
    words: str | None = None


def read_recording(source: AudioSource) -> Tensor:
    """A recording of at most 30 s -> float32 [n] at 24 kHz, its level set.

    Raises:
        AudioError: it cannot be read, is longer, or silent.
    """
    _check_file(source)
    wav = load_audio(source, SAMPLE_RATE)
    check_sound(wav, name_of(source))
    return levelled(wav)


def check_sound(wav: Tensor, name: str) -> None:
    """Raises AudioError for samples [n] at 24 kHz that are too long, or silent."""
    if len(wav) > SECONDS * SAMPLE_RATE:
        raise _too_long(name, len(wav) / SAMPLE_RATE)
    if float(wav.abs().max()) < SILENT:
        raise AudioError(f"{name} is silent: record it again")


def read_examples(given: Iterable[Given] | str | os.PathLike[str] | ExampleSet) -> ExampleSet:
    """Examples of a caller, or the set in a folder, checked and decoded.

    Raises:
        AudioError: a recording cannot be used, or the two of an example differ in sample rate.
        ConfigError: the folder holds no set.
        PromptError: there are no examples, too many, or one lacks a part.
    """
    if isinstance(given, ExampleSet):
        return given
    if isinstance(given, str | os.PathLike):
        return read_set(Path(given))
    sources = [_source(number, each) for number, each in enumerate(given, 1)]
    return ExampleSet(read_sources(sources))


def read_sources(sources: Sequence[Source]) -> tuple[Example, ...]:
    """Examples of their recordings.

    Raises:
        AudioError, PromptError: as `read_examples`.
    """
    check_sources(sources)
    examples = list[Example]()
    for number, each in enumerate(sources, 1):
        with naming(f"example {number}"):
            recordings = read_recording(each.before), read_recording(each.after)
        examples.append(Example(*recordings, each.words))
    return tuple(examples)


def check_sources(sources: Sequence[Source]) -> None:
    """Raises what `read_sources` would, as far as the headers of the recordings tell."""
    if not sources:
        raise PromptError("a conversion needs an example: a recording, and what became of it")
    if len(sources) > MAX_EXAMPLES:
        raise PromptError(f"at most {MAX_EXAMPLES} examples are supported, not {len(sources)}")
    for number, each in enumerate(sources, 1):
        with naming(f"example {number}"):
            _check_rates(each)


def read_set(folder: Path) -> ExampleSet:
    """The set in a folder.

    Raises:
        ConfigError: its set.json is missing or wrong.
        AudioError: a recording cannot be used.
    """
    sources, instruction, consent = set_of(folder)
    with naming(name_of(folder)):
        return ExampleSet(read_sources(sources), instruction, consent)


def set_of(folder: Path) -> tuple[list[Source], str | None, str]:
    """What the set.json of a folder states: recordings and words, instruction, consent note.

    Raises:
        ConfigError: it is missing or wrong.
    """
    path = folder / SET
    if not path.is_file():
        raise ConfigError(f"{folder} holds no examples: there is no {SET} in it")
    raw = read_json(path)
    _check_keys(raw, KEYS, str(path))
    note, instruction, listed = (raw.get(key) for key in ("consent", "instruction", "examples"))
    if not is_note(note):
        raise ConfigError(f"{path}: 'consent' must say {CONSENT}")
    if instruction is not None and not _is_words(instruction):
        raise ConfigError(f"{path}: 'instruction' must be a text, or left out")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_EXAMPLES:
        raise ConfigError(f"{path}: 'examples' must be a list of 1 to {MAX_EXAMPLES}")
    sources = list[Source]()
    for number, each in enumerate(listed, 1):
        where = f"{path}: example {number}"
        if not isinstance(each, dict):
            raise ConfigError(f"{where} must be an object of {', '.join(PARTS)}")
        _check_keys(each, PARTS, where)
        if not _is_words(each.get("words")):
            raise ConfigError(f"{where}: 'words' must be the words of its recording after")
        for part in PARTS[:2]:
            name = each.get(part)
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise ConfigError(f"{where}: {part!r} must name a recording in the same folder")
        sources.append(Source(folder / each["before"], folder / each["after"], each["words"]))
    return sources, instruction, str(note).strip()


def write_set(folder: Path, sources: Sequence[Source], instruction: str, consent: str) -> None:
    """Writes a set whose recordings are copies of files; it is whole or not there.

    Raises:
        ConfigError: the consent note says nothing, or the name cannot be asked for.
        CheckpointError: the folder is there already, or cannot be written.
    """
    check_new_set(folder, consent)
    listed = list[dict[str, str | None]]()
    with new_folder(folder) as place:
        for number, each in enumerate(sources, 1):
            named = dict[str, str | None]()
            for part, source in (("before", each.before), ("after", each.after)):
                path = Path(os.fsdecode(source))  # type: ignore[arg-type]
                named[part] = f"{number}-{part}{path.suffix.lower()}"
                shutil.copyfile(path, place / str(named[part]))
            listed.append(named | {"words": each.words})
        told = {"instruction": instruction, "consent": consent.strip(), "examples": listed}
        write_json(place / SET, told)


def check_new_set(folder: Path, consent: str | None) -> None:
    """Raises what `write_set` would, before anything is loaded."""
    if not is_note(consent):
        raise ConfigError(f"examples are kept with a consent note: say {CONSENT}")
    if NAME.fullmatch(folder.name) is None:
        problem = "the name of a set has 1 to 40 letters, digits, - and _"
        raise ConfigError(f"{problem}, not {folder.name!r:.60}")
    check_new_folder(folder)


def is_note(note: object) -> bool:
    """Whether a consent note says something."""
    return isinstance(note, str) and SHORTEST_NOTE <= len(note.strip()) <= NOTE


def _is_words(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := set(raw) - set(known):
        found = min(unknown)
        raise ConfigError(f"{where}: there is no key {found!r:.60}, only {', '.join(known)}")


def _source(number: int, given: Any) -> Source:
    """A caller's example.

    Raises:
        PromptError: it lacks a part, or has one too many.
    """
    if isinstance(given, Mapping):
        keys = TASK_KEYS if TASK_KEYS[0] in given else PARTS
        unknown = [key for key in given if key not in keys]
        if unknown or not {*keys[:2]} <= {*given}:
            raise PromptError(f"example {number} must have {', '.join(keys)}: {shown([*given])}")
        given = [given[key] for key in keys if key in given]
    if isinstance(given, str | bytes | os.PathLike) or not isinstance(given, Sequence):
        kind = type(given).__name__
        raise PromptError(f"example {number} must be (before, after, words), not a {kind}")
    if not 2 <= len(given) <= 3:
        rule = "two recordings, before and after, and the words of the latter"
        raise PromptError(f"example {number} must be {rule}, not {len(given)} things")
    words = given[2] if len(given) == 3 else None
    if words is not None and not _is_words(words):
        raise PromptError(f"example {number}: the words of the recording after must be a text")
    return Source(given[0], given[1], words)


def _check_rates(source: Source) -> None:
    """Raises AudioError for files that cannot be used as far as their headers tell.

    Recordings are resampled, but two rates in one example show another bandwidth, and that is then
    what a model converts.
    """
    before, after = _check_file(source.before), _check_file(source.after)
    if before is not None and after is not None and before != after:
        names = name_of(source.before), name_of(source.after)
        problem = f"{names[0]} has a sample rate of {before} Hz, and {names[1]} one of {after} Hz"
        raise AudioError(f"{problem}: convert one, so that both have the same")


def _check_file(source: AudioSource) -> int | None:
    """The sample rate that a file's header states; None for what is no file, or has no header.

    Raises:
        AudioError: it is missing, empty or too long.
    """
    if not isinstance(source, str | os.PathLike):
        return None
    if not check_readable(source):
        raise AudioError(f"{name_of(source)} is empty")
    library = soundfile_library()
    try:
        found = library.info(os.fsencode(source))
    except (library.LibsndfileError, TypeError):
        # Decoding says what is wrong with it.
        return None
    if found.duration > SECONDS:
        raise _too_long(name_of(source), found.duration)
    return int(found.samplerate)


def _too_long(name: str, seconds: float) -> AudioError:
    return AudioError(f"{name} is {seconds:.1f} s long, and {SECONDS:.0f} s is the most: cut it")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors say what they are about."""
    try:
        yield
    except MimoFastError as error:
        raise type(error)(f"{what}: {error}") from error
