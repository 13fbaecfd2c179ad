"""`batch`: many requests of one task, as rows of one batch, with a record that resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
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
from mimo_fast.audio.paths import check_folder, check_writable, name_of, reason_of
from mimo_fast.audio.writing import check_output
from mimo_fast.errors import AudioError, MimoFastError
from mimo_fast.mimo_audio import STREAM_OPTIONS, MimoAudio
from mimo_fast.sampling import check_seed
from mimo_fast.text.tasks import find_task

RECORD = "results.jsonl"
"""File of a batch's folder: an object a line for each request that ended."""

MOST_SEED = 2**63


@dataclass(frozen=True)
class BatchResult:
    """What became of one request.

    Attributes:
        index: Its place among the requests.
        text: Text of the reply.
        audio: float32 [n] on the CPU; None where the task has none, or it is in `file`.
        file: Where the audio was written.
        seconds: Of audio.
        finish_reason: Why the reply ended; None with an error.
        error: What ended it instead.
    """

    index: int
    text: str = ""
    audio: Tensor | None = None
    file: Path | None = None
    seconds: float = 0.0
    finish_reason: str | None = None
    error: Exception | None = None


@checked
def batch(
    model: MimoAudio,
    task: str,
    requests: Iterable[Any],
    folder: str | os.PathLike[str] | None = None,
    *,
    seed: int | None = None,
    suffix: str = ".wav",
    progress: bool = True,
    **options: Any,
) -> Iterator[BatchResult]:
    """Replies to many requests of one task, in the order in which they end.

    Requests run as rows of one batch, as many at once as the model has slots, the longest first.
    An error ends only its own request. Closing the iterator, or Ctrl-C, stops after the groups in
    progress.

    Args:
        task: of `MimoAudio.stream`: "tts", "asr", ...
        requests: what to say or to hear, or a mapping of the task's arguments, each.
        folder: gets the audio, 0000.wav for the first request, and `results.jsonl`. Requests that
            it has already are not computed again, and not returned.
        seed: request i has seed + i, so that each says the same again by itself.
        suffix: of audio files.
        progress: shows a bar on a terminal.
        options: further arguments of `MimoAudio.stream`, the same for all.

    Raises:
        ValueError: there is no such task.
        TypeError: it has no such option, or `requests` is one request.
        AudioError: the folder cannot be written.
    """
    known = names_of(find_task(task).prompt, bound=True) or frozenset()
    refuse_unknown(options, known | STREAM_OPTIONS, f"batch({task!r})")
    seed = None if seed is None else check_seed(seed)
    alone = isinstance(requests, str | bytes | os.PathLike | Mapping)
    if alone or getattr(requests, "ndim", 2) < 2:
        kind = type(requests).__name__
        raise TypeError(f"batch: requests must be a list of them, not one {kind}: put it into []")
    wanted = list(enumerate(requests))
    record = None if folder is None else _Record(Path(folder), suffix)
    if record is not None:
        wanted = [(i, each) for i, each in wanted if not record.has(i, each)]
    wanted.sort(key=lambda pair: _size(pair[1]), reverse=True)
    return _results(model, task, wanted, record, seed, progress, options)


def _results(
    model: MimoAudio,
    task: str,
    wanted: list[tuple[int, Any]],
    record: _Record | None,
    seed: int | None,
    progress: bool,
    options: Mapping[str, Any],
) -> Iterator[BatchResult]:
    stopping, running = Event(), dict[Future[BatchResult], Any]()

    def work(index: int, request: Any) -> BatchResult:
        given = dict(request) if isinstance(request, Mapping) else {}
        positional = () if isinstance(request, Mapping) else (request,)
        if seed is not None:
            given["seed"] = (seed + index) % MOST_SEED
        try:
            words, audio = [], []
            with closing(model.stream(task, *positional, **options, **given)) as chunks:
                for chunk in chunks:
                    words.append(chunk.text)
                    audio.append(chunk.audio)
                    if stopping.is_set():
                        return BatchResult(index, finish_reason="cancelled")
            wav = torch.cat(audio)
            seconds, reason = len(wav) / chunk.sample_rate, chunk.finish_reason
            text, file = "".join(words).strip(), None
            if record is not None and len(wav):
                file = record.write_audio(index, model, wav)
            kept = wav if len(wav) and file is None else None
            return BatchResult(index, text, kept, file, seconds, reason)
        except (MimoFastError, TypeError, ValueError) as error:
            return BatchResult(index, error=error)

    slots = model.pipeline.setup.max_batch
    hidden = None if progress else True
    bar = tqdm(total=len(wanted), desc=task, unit="request", disable=hidden, leave=False)
    with bar, ThreadPoolExecutor(slots) as workers:
        try:
            waiting = iter(wanted)
            while True:
                for index, request in waiting:
                    running[workers.submit(work, index, request)] = request
                    if len(running) >= slots:
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
            stopping.set()


class _Record:
    """The folder of a batch.

    Raises:
        AudioError: it cannot be written.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder, self._suffix = folder, suffix
        check_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AudioError(f"cannot write into {name_of(folder)}: {reason_of(error)}") from error
        check_output(self._file(0))
        self._path = folder / RECORD
        check_writable(self._path)
        self._known = dict[int, dict[str, Any]]()
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    found = json.loads(line)
                    self._known[found["index"]] = found
                except (ValueError, KeyError, TypeError):
                    # A line that was cut by the end of the process.
                    continue

    def has(self, index: int, request: Any) -> bool:
        found = self._known.get(index, {})
        if "error" in found or found.get("request") != _fingerprint(request):
            return False
        return "file" not in found or (self._folder / found["file"]).exists()

    def write_audio(self, index: int, model: MimoAudio, wav: Tensor) -> Path:
        file = self._file(index)
        model.save_wav(file, wav)
        return file

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
        with self._path.open("ab+") as file:
            # After a line that was cut.
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:04}{self._suffix}"


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
    """What the length of a reply goes with: letters, bytes of a file, samples."""
    if isinstance(request, Mapping):
        return sum(map(_size, request.values()))
    if isinstance(request, os.PathLike) or (isinstance(request, str) and os.path.isfile(request)):
        try:
            return os.stat(request).st_size
        except OSError:
            return 0
    return len(request) if hasattr(request, "__len__") else 0
