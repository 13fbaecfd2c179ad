"""Types of arguments, and what is known of them before anything else is imported or loaded."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mimo_fast.audio.paths import (
    FORMATS,
    check_folder,
    check_readable,
    check_target,
    check_writable,
    name_of,
)
from mimo_fast.checkpoint.embedded import NANO, QUESTION
from mimo_fast.errors import AudioError
from mimo_fast.text.transcript import SUFFIXES

STANDARD = Path("-")
"""Stands for standard input or output."""

SIGNED = (".wav", ".flac", ".mp3")
"""Suffixes of files that hold signed provenance."""

SEVERAL = ("asr", "convert", "detect")
"""Commands that go on without recordings that cannot be read."""

DEMO_FILES = ("said.wav", "recording_decoded.wav", "reply.wav")

PIPE_IN = "give - in its place and pipe it in"
PIPE_OUT = "give -o - and redirect standard output"


def path(text: str) -> Path:
    """A path; `~` is expanded, also where a shell has not: in --voice=~/me.wav."""
    return Path(os.path.expanduser(text))


NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(.+)", re.DOTALL)
"""An adapter with the name by which requests choose it; a folder with `=` in it begins with ./."""


def read_adapters(given: Sequence[str]) -> tuple[dict[str, Path], bool]:
    """Folders of adapters by their names, and whether it is one that all requests have.

    Raises:
        ValueError: one has no name beside others, or two have the same.
    """
    if len(given) == 1 and NAMED.fullmatch(given[0]) is None:
        folder = path(given[0])
        return {folder.resolve().name: folder}, True
    found = dict[str, Path]()
    for text in given:
        named = NAMED.fullmatch(text)
        if named is None:
            raise ValueError(f"{text!r:.80} needs a name beside others: give NAME=DIR for each")
        name, folder = named[1], path(named[2])
        if name in found:
            raise ValueError(f"two adapters are called {name}")
        found[name] = folder
    return found, False


def points(text: str) -> float:
    """Percentage points, more than 0 and at most 100."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"must be a number up to 100, above 0, not {text:.40}")
    return value


def positive(text: str) -> int:
    return _whole_number(text, 1)


def seed(text: str) -> int:
    return _whole_number(text, 0, 2**63 - 1)


def _whole_number(text: str, least: int, most: int | None = None) -> int:
    wanted = f"a whole number from {least} {'up' if most is None else f'to {most}'}"
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text:.40}")
    return value


def numbered(output: Path, turns: int) -> list[Path]:
    """The files of a dialogue's replies."""
    if turns == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{turn}") for turn in range(1, turns + 1)]


def check_arguments(args: argparse.Namespace) -> None:
    """Checks texts and files, and completes what depends on several arguments.

    `asr`, `convert` and `detect` go on without recordings that cannot be read: they become
    `args.problems`.

    Raises:
        AudioError: an input cannot be read.
        SystemExit: an output cannot be written or is an input, or a text is not text.
    """
    if args.module == "evaluate":
        _check_evaluation(args)
    args.folders = [getattr(args, args.folder)] if args.folder else []
    args.before = [each for folder in args.folders for each in _contents(folder)]
    if args.module == "talk":
        _check_talk(args)
    outputs = [getattr(args, name, None) for name in ("output", "json", "save", "save_examples")]
    args.writes = any(file is not None for file in (*outputs, *args.folders))
    if args.module == "chat" and not args.text:
        args.turns = [path(turn) for turn in args.turns]
    if args.module == "convert":
        _split_examples(args)
    texts = "text", "question", "system", "instruct", "turns", "instructions", "instruction"
    for name in (*texts, "words", "consent"):
        for text in _several(getattr(args, name, None)):
            if isinstance(text, str) and not _is_text(text):
                args.parser.error(f"the {name} is not valid UTF-8: {text!a:.80}")
    for name in ("model", "codec", "adapter", "checkpoint", "source", "target", "directory"):
        # The libraries that read and write weights take no other names.
        for folder in map(str, _several(getattr(args, name, None))):
            if not _is_text(folder):
                args.parser.error(f"{folder!a} is not valid UTF-8: rename the folder")
    if isinstance(adapters := getattr(args, "adapter", None), list):
        try:
            read_adapters(adapters)
        except ValueError as error:
            args.parser.error(f"argument --adapter: {error}")
    inputs = _inputs(args)
    if args.module == "asr":
        _check_transcripts(args)
    if args.module == "convert":
        _check_conversion(args)
    if args.module == "tts":
        if (args.text is None) == (args.lines is None):
            args.parser.error("give a text, or --lines with a file of them")
        if args.lines and (args.voice or args.lookahead != "exact"):
            args.parser.error("--lines goes with neither --voice nor --lookahead")
        if args.play and args.lines:
            args.parser.error("--play does not go with --lines")
        _check_heard(args)
    _check_marks(args)
    examples = [file for pair in getattr(args, "pairs", ()) for file in pair[:2]]
    _check_overlap(args, [*inputs, *examples], _check_outputs(args))
    if [*map(str, inputs), getattr(args, "text", "")].count("-") > 1:
        args.parser.error("standard input can be given once")
    args.problems = _unreadable(inputs)
    # `detect` has a code of its own for what cannot be read, be it one file.
    alone = len(inputs) == 1 and args.module != "detect"
    if args.problems and (args.module not in SEVERAL or alone):
        raise next(iter(args.problems.values()))


def _contents(folder: Path) -> list[Path]:
    return [*whole_checkpoints(folder), *(folder.iterdir() if folder.is_dir() else ())]


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, whose config.json is written last."""
    places = (folder, folder / "lm", folder / "codec")
    return [place for place in places if (place / "config.json").is_file()]


def _several(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _is_text(text: str) -> bool:
    """False for bytes that Python could not decode, which it keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inputs(args: argparse.Namespace) -> list[Path]:
    """Recordings that the command reads."""
    given = [getattr(args, name, None) for name in ("audio", "voice", "turns", "input")]
    return [each for value in given for each in _several(value) if isinstance(each, Path)]


def _unreadable(inputs: list[Path]) -> dict[Path, AudioError]:
    found = dict[Path, AudioError]()
    for file in inputs:
        try:
            if file == STANDARD:
                if sys.stdin.isatty():
                    raise AudioError("standard input is a terminal: redirect a recording to it")
            elif not check_readable(file, PIPE_IN):
                raise AudioError(f"{name_of(file)} is empty")
        except AudioError as error:
            found[file] = error
    return found


def _check_outputs(args: argparse.Namespace) -> list[Path]:
    """Files that the command will write."""
    parser: argparse.ArgumentParser = args.parser
    output: Any = getattr(args, "output", None)
    json: Path | None = getattr(args, "json", None)
    files = list[Path]()
    try:
        option = "-o/--output"
        if output is not None and args.module == "demo":
            if output == STANDARD:
                parser.error("argument -o/--output: a demo writes several files, name a folder")
            check_folder(output)
            files = [output / name for name in DEMO_FILES]
            for file in files:
                if os.path.lexists(file):
                    check_writable(file)
        elif getattr(args, "targets", None) or args.module == "asr":
            files = list(args.targets.values())
            if args.resumes:
                check_folder(output)
            for file in files:
                if not args.resumes or os.path.lexists(file):
                    check_writable(file)
        elif output is not None and getattr(args, "lines", None):
            if output == STANDARD:
                parser.error("argument -o/--output: --lines writes several files, name a folder")
            check_folder(output)
        elif output == STANDARD:
            if sys.stdout.isatty():
                parser.error("standard output is a terminal: redirect it, as in -o - > reply.wav")
        elif output is not None:
            files = numbered(output, len(args.turns) if args.module == "chat" else 1)
            for file in files:
                check_target(file, PIPE_OUT)
        option, save = "--save", getattr(args, "save", None)
        if save is not None:
            check_target(save, "name a file")
            files.append(save)
        option = "--json"
        if json == STANDARD:
            parser.error("argument --json: standard output has the table, name a file")
        if json is not None:
            check_writable(json, "name a file")
            files.append(json)
        option = "DIR"
        for folder in args.folders:
            check_folder(folder)
    except AudioError as error:
        parser.error(f"argument {option}: {error}")
    return files


def _check_evaluation(args: argparse.Namespace) -> None:
    """A set and its data, or the list of sets alone."""
    if args.list:
        args.folder = None
    elif args.set is None:
        args.parser.error("give a set, or --list")
    elif args.data is None:
        args.parser.error("give --data DIR, where the set's files are")
    elif not args.data.is_dir():
        args.parser.error(f"argument --data: {name_of(args.data)} is no folder")
    elif args.target is None:
        name = "-".join(filter(None, (args.set, args.split, args.mode)))
        args.target = Path("evaluations", name)


def _check_talk(args: argparse.Namespace) -> None:
    """Options of a talk that contradict each other, and what --voice is."""
    error = args.parser.error
    if args.input and args.device_in:
        error("--input takes the microphone's place: leave out --device-in")
    if args.output and args.device_out:
        error("--output takes the speaker's place: leave out --device-out")
    if args.mark and args.server:
        error("--mark is for the model in this process: start the server with --mark")
    if args.echo_cancel and (args.input or args.output):
        error("--echo-cancel needs a microphone and a speaker, not --input or --output")
    for option in ("output", "save"):
        file: Path | None = getattr(args, option)
        if file is not None and file.suffix.lower() != ".wav":
            error(
                f"argument --{option}: {name_of(file)} is no WAV file: name one, such as talk.wav"
            )
    if args.input == STANDARD:
        error("argument --input: name a file")
    if args.voice and not args.server:
        args.voice = path(args.voice)


def _split_examples(args: argparse.Namespace) -> None:
    """Adds `pairs`, (in, out, words or None) of each --example, and `words`.

    What follows is TEXT unless it is, or has the name of, a recording; recordings go to `audio`.
    """
    args.pairs, error = list[tuple[Path, Path, str | None]](), args.parser.error
    for given in args.example or ():
        if len(given) < 2:
            error(f"argument --example: {given[0]:.80} is IN alone: give OUT, what became of it")
        source, target, *rest = given
        words = rest.pop(0) if rest and not _is_recording(rest[0]) else None
        if words is not None and not words.strip():
            error("argument --example: TEXT is empty: give the words of OUT, or leave it out")
        args.pairs.append((path(source), path(target), words))
        args.audio += map(path, rest)
    args.words = [words for _, _, words in args.pairs if words]


def _is_recording(text: str) -> bool:
    return text == "-" or os.path.isfile(path(text)) or Path(text).suffix.lower() in FORMATS


def _check_conversion(args: argparse.Namespace) -> None:
    """Options of a conversion that contradict each other; adds `targets` of several recordings."""
    error, several = args.parser.error, len(args.audio) > 1
    if bool(args.pairs) == bool(args.examples):
        error("give --example IN OUT [TEXT], or --examples DIR/NAME")
    if args.instruction is not None and not args.instruction.strip():
        error("argument --instruction: it is empty")
    if args.save_examples and args.examples:
        error("--save-examples keeps what --example gives: leave --examples out")
    if bool(args.save_examples) != (args.consent is not None):
        error("--save-examples and --consent go together")
    args.targets, args.resumes = {}, False
    if not args.audio and args.save_examples:
        if args.output or args.play:
            error("give a recording to convert")
        return
    if not args.audio:
        error("give a recording to convert")
    if several and (args.play or args.output in (None, STANDARD)):
        error("several recordings go to files: name a folder with -o")
    _check_heard(args)
    if several or (args.output is not None and args.output.is_dir()):
        _add_targets(args, ".wav")
    if args.resumes and STANDARD in args.audio:
        error("standard input goes to a file of its own: name one with -o")


def _check_heard(args: argparse.Namespace) -> None:
    """Where speech goes: a file, the speaker or both."""
    if args.output is None and not args.play:
        args.parser.error("give -o FILE, --play, or both")
    if args.play and args.output == STANDARD:
        args.parser.error("--play does not go with -o -")
    if args.device_out and not args.play:
        args.parser.error("--device-out goes with --play")


def _check_marks(args: argparse.Namespace) -> None:
    """What cannot be marked or signed."""
    error: Callable[[str], NoReturn] = args.parser.error
    output: Path | None = getattr(args, "output", None)
    marked, signed = getattr(args, "mark", False), getattr(args, "sign", None)
    if (marked or signed) and getattr(args, "text", None) is True:
        error("--mark and --sign are for speech: leave them out with --text")
    if not signed:
        return
    if output is None or output == STANDARD:
        error("--sign goes with -o FILE: speech that is heard as it is made has no provenance")
    files = not (getattr(args, "lines", None) or getattr(args, "targets", None))
    if files and args.module != "demo" and output.suffix.lower() not in SIGNED:
        error(f"--sign needs a file that holds provenance: {', '.join(SIGNED)}, not {output.name}")


def _check_transcripts(args: argparse.Namespace) -> None:
    """Adds `targets`, the file of each recording, and whether what is there is kept: `resumes`."""
    if bool(args.audio) == args.live:
        args.parser.error("give recordings, or --live" if not args.live else "--live takes none")
    if args.output == STANDARD:
        args.output = None
    several = len(args.audio) > 1
    if args.whole and (args.live or args.output or args.format != "text"):
        args.parser.error("--whole prints text: it goes with neither --live, -o nor --format")
    if several and not args.output and args.format in ("srt", "vtt", "tsv"):
        args.parser.error(f"several recordings in {args.format} go to files: name a folder with -o")
    args.targets, args.resumes = {}, False
    if args.output is not None:
        _add_targets(args, SUFFIXES[args.format])


def _add_targets(args: argparse.Namespace, suffix: str) -> None:
    args.targets, args.resumes = {}, len(args.audio) > 1 or args.output.is_dir()
    for recording in args.audio or [STANDARD]:
        stem = "standard input" if recording == STANDARD else recording.stem
        target = args.output / f"{stem}{suffix}" if args.resumes else args.output
        args.targets[recording] = target


def _check_overlap(args: argparse.Namespace, inputs: list[Path], outputs: list[Path]) -> None:
    """Nothing that is read may be written, under whatever name, nor one file twice."""
    read = [*inputs, QUESTION]
    for option, part in (("model", "lm"), ("codec", "codec")):
        folder = path(getattr(args, option, None) or "")
        for each in (folder, NANO / part):
            if each != Path() and each.is_dir():
                read += each.iterdir()
    for i, output in enumerate(outputs):
        name = name_of(output)
        if any(_is_same(output, other) for other in read):
            args.parser.error(f"{name} is an input and would be overwritten: name another file")
        if any(_is_same(output, other) for other in outputs[:i]):
            args.parser.error(f"{name} would be written twice: name another file")


def _is_same(one: Path, other: Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False
