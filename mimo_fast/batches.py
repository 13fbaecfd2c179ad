"""`batch`: many requests of one task, as rows of one batch, with a record that resumes.

A folder of results and a process that ended at any moment: each file appears whole, then its line
of the record, so what has a line is there, and what has none is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.arguments import checked, names_of, refuse_unknown
from mimo_fast.audio.files import check_audio
from mimo_fast.audio.paths import (
    check_folder,
    check_writable,
    name_of,
    reason_of,
    soundfile_library,
    write_whole,
)
from mimo_fast.audio.writing import check_output
from mimo_fast.errors import AudioError
from mimo_fast.mimo_audio import STREAM_OPTIONS, MimoAudio
from mimo_fast.runtime.conversion import Converter
from mimo_fast.runtime.engine.stream import ChunkStream
from mimo_fast.runtime.transcription import TranscriptStream
from mimo_fast.sampling import check_seed
from mimo_fast.text.tasks import find_task
from mimo_fast.text.transcript import SUFFIXES, WRITERS, Transcript, TranscriptSegment

RECORD = "results.jsonl"
"""File of a batch's folder: an object a line for each request that ended."""

TRANSCRIBE = "transcribe"
"""Besides the tasks of `MimoAudio.stream`: recordings of any length, as `MimoAudio.transcript`."""

CONVERT = "convert"
"""Recordings converted by the same examples, as `MimoAudio.converter`."""

CONVERT_OPTIONS = frozenset({"examples", "instruction", "adapter", "max_new_tokens", "priority"})

TRANSCRIBE_OPTIONS = frozenset({"template", "max_new_tokens", "language", "adapter"})

MOST_SEED = 2**63

Work = Callable[[int, Any], "BatchResult"]
"""Answers a request, of which it gets the index."""


@dataclass(frozen=True)
class BatchResult:
    """What became of one request.

    Attributes:
        index: Its place among the requests.
        text: Text of the reply.
        audio: float32 [n] on the CPU; None where the task has none, or it is in `file`.
        file: Where the audio, or the transcript, was written.
        seconds: Of audio; of the recording where it was transcribed.
        finish_reason: Why the reply ended; None with an error.
        error: What ended it instead.
        transcript: Of the task "transcribe": what was said when.
    """

    index: int
    text: str = ""
    audio: Tensor | None = None
    file: Path | None = None
    seconds: float = 0.0
    finish_reason: str | None = None
    error: Exception | None = None
    transcript: Transcript | None = None


@checked
def batch(
    model: MimoAudio,
    task: str,
    requests: Iterable[Any],
    folder: str | os.PathLike[str] | None = None,
    *,
    seed: int | None = None,
    suffix: str | None = None,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Iterator[BatchResult]:
    """Replies to many requests of one task, in the order in which they end.

    Requests run as rows of one batch, as many at once as the model has slots, the longest first.
    An error ends only its own request. Closing the iterator, or Ctrl-C, stops after the groups in
    progress.

    Args:
        task: of `MimoAudio.stream`: "tts", "asr", ...; or "transcribe" for recordings of any
            length, cut at pauses as `MimoAudio.transcript` cuts them; or "convert" for recordings
            to be converted by the same `examples`, and `instruction`, of `MimoAudio.converter`, or
            by a `Converter` as examples.
        requests: what to say or to hear, or a mapping of the task's arguments, each.
        folder: gets the audio, 0000.wav for the first request, and `results.jsonl`. Requests that
            it has already are not computed again, and not returned. Of "transcribe" and "convert"
            files have the names of their recordings, talk.txt or talk.wav for talk.flac, and what
            is there already is kept.
        seed: request i has seed + i, so that each says the same again by itself.
        suffix: of audio files [.wav]; of transcripts .txt, .json, .srt, .vtt or .tsv [.txt].
        names: of audio files, without their suffix, one a request [0000, 0001, ...]; not of
            "transcribe" and "convert".
        overwrite: whether what the folder has already is computed again.
        progress: shows a bar on a terminal.
        options: further arguments of `MimoAudio.stream`, the same for all. Listeners come before
            these replies, unless it is `priority="listener"`.

    Raises:
        ValueError: there is no such task, or two recordings have one name, or that of a result;
            or `names` are not one a request.
        TypeError: it has no such option, or `requests` is one request.
        AudioError: the folder cannot be written, or an example cannot be used.
    """
    if task in (TRANSCRIBE, CONVERT):
        own = TRANSCRIBE_OPTIONS if task == TRANSCRIBE else CONVERT_OPTIONS
        refuse_unknown(options, own, f"batch({task!r})")
    else:
        known = names_of(find_task(task).prompt, bound=True) or frozenset()
        refuse_unknown(options, known | STREAM_OPTIONS, f"batch({task!r})")
    seed = None if seed is None else check_seed(seed)
    alone = isinstance(requests, str | bytes | os.PathLike | Mapping)
    if alone or getattr(requests, "ndim", 2) < 2:
        kind = type(requests).__name__
        raise TypeError(f"batch: requests must be a list of them, not one {kind}: put it into []")
    wanted = list(enumerate(requests))
    if names is not None and (task in (TRANSCRIBE, CONVERT) or len(names) != len(wanted)):
        raise ValueError(f"batch({task!r}): {len(names)} names for {len(wanted)} requests")
    if task == CONVERT:
        if "examples" not in options:
            raise TypeError("batch('convert') needs examples")
        given = options.pop("examples")
        how = options.pop("instruction", None), options.pop("adapter", None)
        ready = isinstance(given, Converter) and how == (None, None)
        options["converter"] = given if ready else model.converter(given, *how)
    record: _Record | None = None
    if folder is not None and task == TRANSCRIBE:
        record = _Transcripts(Path(folder), suffix or ".txt", wanted)
    elif folder is not None and task == CONVERT:
        record = _Named(Path(folder), suffix or ".wav", wanted)
    elif folder is not None:
        record = _Record(Path(folder), suffix or ".wav", names)
    if record is not None and not overwrite:
        wanted = [(i, each) for i, each in wanted if not record.has(i, each)]
    wanted.sort(key=lambda pair: _size(pair[1]), reverse=True)
    return _Batch(model, task, record, seed, options).results(wanted, progress)


class _Batch:
    """Requests of one task at work, each in a thread that reads its reply."""

    def __init__(
        self,
        model: MimoAudio,
        task: str,
        record: _Record | None,
        seed: int | None,
        options: Mapping[str, Any],
    ) -> None:
        self._model, self._task, self._record = model, task, record
        self._seed, self._options = seed, options
        self._slots = model.pipeline.setup.max_batch
        self._stopping = Event()
        self._running = dict[Future[BatchResult], Any]()

    def results(self, wanted: list[tuple[int, Any]], progress: bool) -> Iterator[BatchResult]:
        running, record = self._running, self._record
        works: dict[str, Work] = {TRANSCRIBE: self._transcribe, CONVERT: self._convert}
        work = works.get(self._task, self._reply)
        hidden = None if progress else True
        bar = tqdm(total=len(wanted), desc=self._task, unit="request", disable=hidden, leave=False)
        with bar, ThreadPoolExecutor(self._slots) as workers:
            try:
                waiting = iter(wanted)
                while True:
                    for index, request in waiting:
                        running[workers.submit(self._attempt, work, index, request)] = request
                        if len(running) >= self._slots:
                            break
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        request, result = running.pop(future), future.result()
                        if record is not None:
                            record.add(request, result)
                        bar.update()
                        yield result
            finally:
                self._stopping.set()
                self._keep_what_ended()

    def _keep_what_ended(self) -> None:
        """Requests that ended while nobody asked for another result are done all the same."""
        for future, request in self._running.items():
            if self._record is not None and future.done() and future.exception() is None:
                self._record.add(request, future.result())

    def _attempt(self, work: Work, index: int, request: Any) -> BatchResult:
        try:
            return work(index, request)
        except Exception as error:
            # Whatever is wrong with one request ends no other.
            return BatchResult(index, error=error)

    def _arguments(self, index: int, request: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(request) if isinstance(request, Mapping) else {}
        if self._seed is not None:
            given["seed"] = (self._seed + index) % MOST_SEED
        return () if isinstance(request, Mapping) else (request,), given

    def _reply(self, index: int, request: Any) -> BatchResult:
        positional, given = self._arguments(index, request)
        options = {"priority": "batch", **self._options, **given}
        return self._spoken(index, self._model.stream(self._task, *positional, **options))

    def _convert(self, index: int, request: Any) -> BatchResult:
        positional, given = self._arguments(index, request)
        options = {"priority": "batch", **self._options, **given}
        converter: Converter = options.pop("converter")
        return self._spoken(index, converter.stream(*positional, **options))

    def _spoken(self, index: int, stream: ChunkStream) -> BatchResult:
        """Reads a reply to its end."""
        words, audio = [], []
        with closing(stream) as chunks:
            for chunk in chunks:
                words.append(chunk.text)
                audio.append(chunk.audio)
                if self._stopping.is_set():
                    return BatchResult(index, finish_reason="cancelled")
        wav = torch.cat(audio)
        seconds, reason = len(wav) / chunk.sample_rate, chunk.finish_reason
        text, file = "".join(words).strip(), None
        if self._record is not None and len(wav):
            file = self._record.file(index)
            self._model.save_wav(file, wav)
        kept = wav if len(wav) and file is None else None
        return BatchResult(index, text, kept, file, seconds, reason)

    def _transcribe(self, index: int, request: Any) -> BatchResult:
        positional, given = self._arguments(index, request)
        if positional:
            given["audio"] = positional[0]
        pipeline, segments = self._model.pipeline, list[TranscriptSegment]()
        if isinstance(given.get("audio"), str | os.PathLike):
            check_audio(given["audio"])
        stream = TranscriptStream(
            pipeline, **{**self._options, **given}, at_once=self._pieces_at_once
        )
        with closing(stream):
            for segment in stream:
                segments.append(segment)
                if self._stopping.is_set():
                    return BatchResult(index, finish_reason="cancelled")
        found = Transcript(stream.joined, tuple(segments), stream.duration)
        reasons = [each.finish_reason for each in segments if each.finish_reason != "stop"]
        file = None
        if isinstance(self._record, _Transcripts):
            file = self._record.file(index)
            write_whole(file, self._record.write(found).encode())
        reason = reasons[0] if reasons else "stop"
        return BatchResult(index, found.text, None, file, found.duration, reason, transcript=found)

    def _pieces_at_once(self) -> int:
        """Pieces of each recording: those that run share the slots."""
        active = sum(not future.done() for future in list(self._running))
        return max(self._slots // max(active, 1), 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a record, a line each; none of a file that does not exist."""
    found = list[dict[str, Any]]()
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            each = json.loads(line)
        except ValueError:
            # A line that was cut by the end of the process.
            continue
        if isinstance(each, dict):
            found.append(each)
    return found


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Appends an object to a record, in one write.

    Raises:
        AudioError: the file cannot be written.
    """
    data = json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    try:
        with path.open("ab+") as file:
            # After a line that was cut.
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    data = b"\n" + data
            file.write(data)
    except OSError as error:
        raise AudioError(f"cannot write {name_of(path)}: {reason_of(error)}") from error


class _Record:
    """The folder of a batch.

    Raises:
        AudioError: it cannot be written.
    """

    def __init__(self, folder: Path, suffix: str, names: Sequence[str] | None = None) -> None:
        self._folder, self._suffix, self._names = folder, suffix, names
        check_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AudioError(f"cannot write into {name_of(folder)}: {reason_of(error)}") from error
        self._check_names()
        self._path = folder / RECORD
        check_writable(self._path)
        self._known = {line["index"]: line for line in read_lines(self._path) if "index" in line}

    def has(self, index: int, request: Any) -> bool:
        found = self._known.get(index, {})
        if "error" in found or found.get("request") != _fingerprint(request):
            return False
        return "file" not in found or (self._folder / found["file"]).exists()

    def _check_names(self) -> None:
        check_output(self.file(0))

    def add(self, request: Any, result: BatchResult) -> None:
        if result.finish_reason == "cancelled":
            return
        line: dict[str, Any] = {"index": result.index, "request": _fingerprint(request)}
        if result.error is not None:
            line["error"] = " ".join(str(result.error).split())
        else:
            line |= {"text": result.text, "finish_reason": result.finish_reason}
        if result.file is not None:
            line |= {"file": result.file.name, "seconds": round(result.seconds, 3)}
        add_line(self._path, line)

    def file(self, index: int) -> Path:
        """Where the result of a request is written."""
        name = f"{index:04}" if self._names is None else self._names[index]
        return self._folder / f"{name}{self._suffix}"


class _Named(_Record):
    """The folder of a batch of recordings, each result with the name of its recording."""

    def __init__(self, folder: Path, suffix: str, wanted: Sequence[tuple[int, Any]]) -> None:
        self._files = dict[int, Path]()
        named = dict[str, str]()
        for index, request in wanted:
            audio = request.get("audio") if isinstance(request, Mapping) else request
            stem = f"{index:04}"
            if isinstance(audio, str | os.PathLike):
                stem = Path(os.fsdecode(audio)).stem
            if named.setdefault(stem, _fingerprint(audio)) != _fingerprint(audio):
                raise ValueError(f"{stem}{suffix} would be written twice: rename a recording")
            self._files[index] = file = folder / f"{stem}{suffix}"
            if isinstance(audio, str | os.PathLike) and os.path.realpath(audio) == str(
                file.parent.resolve() / file.name
            ):
                raise ValueError(f"{file} is a recording and would be overwritten")
        super().__init__(folder, suffix)

    def has(self, index: int, request: Any) -> bool:
        return self._files[index].exists()

    def file(self, index: int) -> Path:
        return self._files[index]

    def _check_names(self) -> None:
        for file in self._files.values():
            if os.path.lexists(file):
                check_writable(file)


class _Transcripts(_Named):
    """Transcripts, of which the suffix chooses the format."""

    def __init__(self, folder: Path, suffix: str, wanted: Sequence[tuple[int, Any]]) -> None:
        forms = {ending: form for form, ending in SUFFIXES.items()}
        if suffix not in forms:
            raise ValueError(f"transcripts end in {', '.join(forms)}, not {suffix!r}")
        self.write = WRITERS[forms[suffix]]
        super().__init__(folder, suffix, wanted)


def _fingerprint(request: Any) -> str:
    """The request itself where it is text or a path, else a digest of what it holds."""
    if isinstance(request, str | os.PathLike):
        return os.fspath(request) if isinstance(request, str) else str(request)
    if isinstance(request, Mapping):
        parts = {str(key): _fingerprint(request[key]) for key in request}
        return json.dumps(parts, sort_keys=True, ensure_ascii=False)
    data = repr(request).encode()
    if isinstance(request, bytes | bytearray):
        data = bytes(request)
    elif hasattr(request, "__array__"):
        data = np.asarray(request).tobytes()
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _size(request: Any) -> int:
    """What the length of a reply goes with: letters, samples, milliseconds of a file."""
    if isinstance(request, Mapping):
        return sum(map(_size, request.values()))
    if isinstance(request, os.PathLike) or (isinstance(request, str) and os.path.isfile(request)):
        library = soundfile_library()
        try:
            return round(1000 * library.info(os.fsencode(request)).duration)
        except (library.LibsndfileError, TypeError, ValueError, OSError):
            # Unreadable ones fail soon, and before the others.
            return MOST_SEED
    return len(request) if hasattr(request, "__len__") else 0
