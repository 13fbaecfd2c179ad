"""`mimo-fast asr WAV ...`: transcribes recordings of any length."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.files import check_audio
from mimo_fast.audio.paths import name_of, soundfile_library, write_whole
from mimo_fast.batches import TRANSCRIBE, batch
from mimo_fast.cli.arguments import STANDARD
from mimo_fast.cli.common import SAMPLE_RATE, drawn, load_model, load_recording, print_text
from mimo_fast.cli.microphone import microphone
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import report, say
from mimo_fast.errors import AudioError, MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.transcription import TranscriptStream
from mimo_fast.text.transcript import SUFFIXES, WRITERS, Transcript, TranscriptSegment, as_object

LIVE_WAIT = 0.6
"""Seconds of silence after which live speech is transcribed."""

Recording = Path | Tensor
"""A file that is cut at its pauses or, for one pass, samples [n]."""


def run(args: argparse.Namespace) -> int:
    if args.live:
        return _listen(args)
    for error in args.problems.values():
        report(error)
    failed = len(args.problems)
    recordings = [*dict.fromkeys(args.audio)] if args.targets else args.audio
    done = {path for path, target in args.targets.items() if _is_there(args, target)}
    if done:
        say(f"{len(done)} of {len(recordings)} are there already (--overwrite makes them again)")
    waiting = [path for path in recordings if path not in args.problems and path not in done]
    if not waiting:
        return int(failed > 0)
    if len(args.audio) > 1 and not args.whole:
        return _transcribe_all(args, waiting, failed)
    with ExitStack() as stack:
        opened = dict[Path, Recording]()
        if len(waiting) == 1:
            # Before a model is loaded, so that a bad one does not cost that time.
            opened[waiting[0]] = stack.enter_context(_opened(args, waiting[0]))
        model = load_model(args, max_batch=1 if args.whole else args.streams)
        for path in waiting:
            # One that cannot be transcribed ends only itself.
            try:
                with _opened(args, path) if path not in opened else nullcontext(opened[path]) as it:
                    _transcribe(model, args, path, it)
            except MimoFastError as error:
                report(error)
                failed += 1
    return int(failed > 0)


def _transcribe_all(args: argparse.Namespace, waiting: list[Path], failed: int) -> int:
    """Several recordings at once, the longest first; transcripts are printed in the order given."""
    with ExitStack() as stack:
        files = list[Path]()
        for path in waiting:
            file = path
            if path == STANDARD:
                file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "standard input")
                _spool(file)
            files.append(file)
        model = load_model(args, max_batch=args.streams)
        # What is there already is not among them.
        options = drawn(model, args) | {"language": args.language, "overwrite": True}
        if args.targets:
            options |= {"folder": args.output, "suffix": SUFFIXES[args.format]}
        said = _InOrder(len(waiting))
        # An interrupt, too, prints what is known.
        stack.callback(said.rest)
        for result in batch(model, TRANSCRIBE, files, **options):
            path, found = waiting[result.index], result.transcript
            lines = list[str]()
            if result.error is not None or found is None:
                failed += 1
                report(_renamed(result.error, files[result.index], path))
            else:
                _warn(found, args, _name(path))
                if result.file is not None:
                    written.append(name_of(result.file))
                elif args.format == "json":
                    whole = {"file": str(path)} | as_object(found)
                    lines = [json.dumps(whole, ensure_ascii=False)]
                else:
                    lines = [f"{name_of(path)}: {found.text}"]
            said.add(result.index, lines)
    count = len(args.audio) if not args.targets else len(args.targets)
    kept = count - len(waiting) - len(args.problems)
    before = f", {kept} were there already" if kept else ""
    lost = f", {failed} failed" if failed else ""
    into = f" into {name_of(args.output)}" if args.targets else ""
    done = len(waiting) + len(args.problems) - failed
    say(f"transcribed {done} recordings{into}{before}{lost}")
    return int(failed > 0)


class _InOrder:
    """Lines of recordings that end in any order, printed in the order of the recordings."""

    def __init__(self, count: int) -> None:
        self._lines = dict[int, list[str]]()
        self._next, self._count = 0, count

    def add(self, index: int, lines: list[str]) -> None:
        self._lines[index] = lines
        while self._next in self._lines:
            self._print(self._lines.pop(self._next))
            self._next += 1

    def rest(self) -> None:
        """What waits for one that did not come."""
        for index in sorted(self._lines):
            self._print(self._lines.pop(index))

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            # A progress bar on the same terminal makes room for it.
            tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def _renamed(error: Exception | None, file: Path, path: Path) -> Exception:
    """The error, in which standard input has its name."""
    if error is None:
        return MimoFastError(f"{_name(path)}: nothing was transcribed")
    if not isinstance(error, MimoFastError) or file == path:
        return error
    return MimoFastError(str(error).replace(str(file), _name(path)))


def _is_there(args: argparse.Namespace, target: Path) -> bool:
    return not args.overwrite and args.resumes and target.exists()


def _transcribe(
    model: MimoAudio, args: argparse.Namespace, path: Path, recording: Recording
) -> None:
    options = drawn(model, args)
    if isinstance(recording, Tensor):
        prefix = f"{name_of(path)}: " if len(args.audio) > 1 else ""
        tag = model.lm.config.architecture.tag_of(args.language)
        print_text(model, args, model.stream("asr", recording, tag, **options), prefix)
        return
    target: Path | None = args.targets.get(path)
    shows = target is None and args.format == "text"
    with _progress(_seconds(recording), shows) as bar:
        stream = model.transcript(recording, language=args.language, **options)
        segments = list[TranscriptSegment]()
        with closing(stream):
            for segment in _printed(stream) if shows else stream:
                segments.append(segment)
                bar.update(stream.duration - bar.n)
        bar.update(stream.duration - bar.n)
    found = Transcript(stream.joined, tuple(segments), stream.duration)
    if target is not None:
        _write(target, WRITERS[args.format](found))
    elif not shows:
        print(WRITERS[args.format](found), end="", flush=True)
    _warn(found, args, _name(path))


def _printed(stream: TranscriptStream) -> Iterator[TranscriptSegment]:
    """Prints what is said as it is known, on one line."""
    shown = ""
    try:
        for segment in stream:
            new = stream.joined[len(shown) :]
            print(new, end="", flush=True)
            shown = stream.joined
            yield segment
    finally:
        # An error, too, begins a line of its own.
        if shown or sys.exc_info()[0] is None:
            print(flush=True)


def _warn(found: Transcript, args: argparse.Namespace, name: str) -> None:
    if not found.segments:
        say(
            f"warning: no speech was found in the {found.duration:.1f} s of {name}; --whole "
            "transcribes it all the same"
        )
    doubted = [segment for segment in found.segments if segment.warning is not None]
    if doubted:
        several = len(found.segments) > 1
        where = f" (in {len(doubted)} of {len(found.segments)} pieces of {name})" if several else ""
        say(f"warning: {doubted[0].warning}{where}")
    cut = [segment for segment in found.segments if segment.finish_reason != "stop"]
    if cut:
        groups = f"after {args.max_tokens} groups: raise --max-tokens" if args.max_tokens else ""
        why = groups or "where the model went on without an end"
        say(f"warning: {len(cut)} of {len(found.segments)} pieces of {name} were cut {why}")


def _name(path: Path) -> str:
    return "standard input" if path == STANDARD else name_of(path)


@contextmanager
def _opened(args: argparse.Namespace, path: Path) -> Iterator[Recording]:
    """What is to be transcribed; standard input is spooled to the disk."""
    if args.whole:
        yield load_recording(path, args.prepare)
        return
    with tempfile.TemporaryDirectory() if path == STANDARD else nullcontext("") as folder:
        file = Path(folder, "standard input") if folder else path
        if folder:
            _spool(file)
        try:
            check_audio(file)
            yield file
        except AudioError as error:
            raise AudioError(str(error).replace(str(file), _name(path))) from error


def _spool(file: Path) -> None:
    with file.open("wb") as spooled:
        shutil.copyfileobj(sys.stdin.buffer, spooled)


def _seconds(path: Path) -> float | None:
    library = soundfile_library()
    try:
        found = library.info(os.fsencode(path))
    except (library.LibsndfileError, TypeError):
        return None
    # A pipe's header states no length.
    return found.duration if 0 < found.duration < 10**6 else None


@contextmanager
def _progress(seconds: float | None, shows: bool) -> Iterator[tqdm]:
    """A bar in seconds of the recording, with how many times faster than it the work is."""
    # Beside words on the same terminal it would be in their way.
    hidden = True if shows and sys.stdout.isatty() else None
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, {rate_noinv_fmt} [{remaining}]"
    options = {"bar_format": form} if seconds else {}
    with tqdm(
        desc="transcribing", total=seconds, unit="x", disable=hidden, leave=False, **options
    ) as bar:
        yield bar


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text.encode())
    written.append(name_of(target))


def _listen(args: argparse.Namespace) -> int:
    """Words of the microphone as they come; Ctrl-C ends the recording, and the rest is said."""
    with microphone(SAMPLE_RATE) as blocks:
        # What is said meanwhile is kept.
        model = load_model(args, max_batch=1)
        say("listening; Ctrl-C ends it")
        how = drawn(model, args) | {"waits": LIVE_WAIT, "language": args.language}
        stream = model.transcript(blocks, **how)
        segments = list[TranscriptSegment]()
        with closing(stream):
            for segment in stream:
                segments.append(segment)
                if args.format == "text" and segment.text:
                    print(segment.text, flush=True)
    found = Transcript(stream.joined, tuple(segments), stream.duration)
    target: Path | None = args.targets.get(STANDARD)
    if target is not None:
        _write(target, WRITERS[args.format](found))
    elif args.format != "text":
        print(WRITERS[args.format](found), end="", flush=True)
    _warn(found, args, "the microphone")
    return 0
