"""Audio of the wire, by PyAV: encoders that stream, and decoders that end at a limit.

    samples -> speed -> encoder -> muxer -> bytes, as they are made
    bytes -> container by its first bytes -> decoder -> mono at the model's rate, in blocks

Everything here computes: the event loop leaves it to `AudioThreads`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO, Generic, ParamSpec, TypeVar, cast

import av
import numpy as np
import torch
from torch import Tensor

from mimo_fast.audio.files import MAX_CHANNELS, MOST_BYTES, DecodeLimits, mixed_blocks
from mimo_fast.errors import AudioError
from mimo_fast.marking.watermark import MarkStream

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

SLOWEST, FASTEST = 0.25, 4.0
"""Speeds of OpenAI's API."""

BLOCK = 2**16
"""Samples that a decoder gives at once."""

DAMAGED = 16
"""Packets that may be damaged in a recording that is used all the same."""

SPOOL = 2**20
"""Bytes that are held in memory before they go to the disk."""


@dataclass(frozen=True)
class Form:
    """A form of audio that clients ask for.

    Attributes:
        media: Its media type.
        container, codec, samples: FFmpeg's names; without a container it is samples.
        whole: Whether it is sent at its end only, since its header states its length.
    """

    media: str
    container: str = ""
    codec: str = "pcm_s16le"
    samples: str = "s16"
    bit_rate: int | None = None
    container_options: dict[str, str] = field(default_factory=dict)
    whole: bool = False


FORMS = {
    "mp3": Form(
        "audio/mpeg",
        "mp3",
        "libmp3lame",
        "s16p",
        64_000,
        {"write_xing": "0", "id3v2_version": "0"},
    ),
    "opus": Form("audio/ogg", "ogg", "libopus", "s16", 48_000, {"page_duration": "40000"}),
    "aac": Form("audio/aac", "adts", "aac", "fltp", 64_000),
    # Common readers of FLAC refuse one that does not state its length.
    "flac": Form("audio/flac", "flac", "flac", whole=True),
    "wav": Form("audio/wav", "wav"),
    "pcm": Form("audio/pcm"),
}
"""The six of `/v1/audio/speech`; all at the model's rate, in mono. A WAV's length is unknown."""


class _Sink:
    """What a muxer writes into; it cannot be sought in."""

    def __init__(self) -> None:
        self._parts = list[bytes]()

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


class Encoder:
    """Float samples at `rate` -> bytes of a form, as they come.

    Args:
        name: a key of `FORMS`.
        speed: how fast it is played; the pitch stays.
        mark: whether what is played carries a watermark, which delays it by 0.2 s.
    """

    def __init__(self, name: str, rate: int, speed: float = 1.0, mark: bool = False) -> None:
        self.form, self._rate = FORMS[name], rate
        # Behind the change of speed, which no mark survives.
        self._mark = MarkStream(rate) if mark else None
        self._tempo = None if speed == 1.0 else _Tempo(rate, speed)
        self._sink, self._box = _Sink(), None
        self._file: BinaryIO | None = None
        if not self.form.container:
            return
        if self.form.whole:
            # Closed by `finish` or `close`.
            self._file = tempfile.SpooledTemporaryFile(SPOOL)  # type: ignore[assignment]  # noqa: SIM115
        options = {"flush_packets": "1", **self.form.container_options}
        self._box = av.open(
            self._file or self._sink, "w", format=self.form.container, container_options=options
        )
        stream: Any = self._box.add_stream(self.form.codec, rate=rate)
        stream.layout, stream.format = "mono", self.form.samples
        if self.form.bit_rate:
            stream.bit_rate = self.form.bit_rate
        # Threads of the codec's own would cost more than the work, which is milliseconds.
        stream.codec_context.thread_count = 1
        self._stream = stream

    @property
    def light(self) -> bool:
        """Whether a push is not worth another thread."""
        return self.form.codec == "pcm_s16le" and self._tempo is None and self._mark is None

    def push(self, audio: Tensor) -> bytes:
        """More samples [n] -> what is final."""
        samples = audio.numpy()
        for part in [samples] if self._tempo is None else self._tempo.push(samples):
            self._write(part if self._mark is None else self._marked(part))
        return self._sink.take()

    def finish(self) -> Iterator[bytes]:
        """The rest, in parts."""
        if self._tempo is not None:
            for part in self._tempo.finish():
                self._write(part if self._mark is None else self._marked(part))
        if self._mark is not None:
            self._write(self._mark.finish().numpy())
        if self._box is not None:
            self._box.mux(self._stream.encode(None))
            self._box.close()
        if self._file is not None:
            self._file.seek(0)
            with self._file:
                while encoded := self._file.read(BLOCK):
                    yield encoded
            return
        yield self._sink.take()

    def close(self) -> None:
        """Lets go of what an encoder that did not finish holds."""
        if self._file is not None:
            self._file.close()

    def _marked(self, samples: np.ndarray) -> np.ndarray:
        assert self._mark is not None
        return self._mark.push(torch.from_numpy(np.ascontiguousarray(samples, np.float32))).numpy()

    def _write(self, samples: np.ndarray) -> None:
        if not len(samples):
            return
        pcm = (np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2")
        if self._box is None:
            self._sink.write(pcm.tobytes())
            return
        # PyAV gives the codec its format, and frames of its size.
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = self._rate
        self._box.mux(self._stream.encode(frame))


class _Filters:
    """A chain of FFmpeg's filters, without threads of its own."""

    def __init__(self, rate: int, samples: str, layout: str, *filters: tuple[str, str]) -> None:
        self._graph = av.filter.Graph()
        self._graph.threads = 1
        source = self._graph.add_abuffer(sample_rate=rate, format=samples, layout=layout)
        chain = [self._graph.add(*each) for each in filters]
        self._graph.link_nodes(source, *chain, self._graph.add("abuffersink")).configure()

    def push(self, frame: av.AudioFrame | None) -> Iterator[av.AudioFrame]:
        """A frame, or None for the end -> the frames that come of it."""
        self._graph.push(frame)
        with suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                yield cast(av.AudioFrame, self._graph.pull())


class _Tempo:
    """FFmpeg's `atempo`, in parts."""

    def __init__(self, rate: int, speed: float) -> None:
        self._rate, self._samples = rate, 0
        # One filter slows down by half at most.
        tempos = [speed] if speed >= 0.5 else [0.5, speed / 0.5]
        chain = [("atempo", f"{tempo:.6f}") for tempo in tempos]
        self._filters = _Filters(rate, "flt", "mono", *chain)

    def push(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        if len(samples):
            given = np.ascontiguousarray(samples, np.float32)[None]
            frame = av.AudioFrame.from_ndarray(given, format="flt", layout="mono")
            frame.sample_rate, frame.pts = self._rate, self._samples
            self._samples += len(samples)
            yield from (found.to_ndarray()[0] for found in self._filters.push(frame))

    def finish(self) -> Iterator[np.ndarray]:
        if self._samples:
            yield from (found.to_ndarray()[0] for found in self._filters.push(None))


CONTAINERS = {
    "wav": "wav",
    "mp3": "mp3",
    "flac": "flac",
    "ogg": "ogg",
    "webm": "matroska",
    "m4a": "mov",
    "aac": "aac",
}
"""What a client may send, by OpenAI's names -> FFmpeg's demuxer."""

CODECS = frozenset(
    {"aac", "alac", "flac", "libopus", "mp3", "mp3float", "opus", "vorbis"}
    | {"pcm_alaw", "pcm_f32le", "pcm_f64le", "pcm_mulaw", "pcm_s16le", "pcm_s24le", "pcm_s32le"}
    | {"pcm_u8"}
)
"""Decoders that are used: none that few use, and so few have tested."""


def kind_of(head: bytes) -> str | None:
    """The key of `CONTAINERS` that a file's first bytes (12 at least) say; None for no audio."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[4:8] == b"ftyp":
        return "m4a"
    marks = {b"fLaC": "flac", b"OggS": "ogg", b"\x1a\x45\xdf\xa3": "webm", b"ID3": "mp3"}
    for mark, kind in marks.items():
        if head.startswith(mark):
            return kind
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        # Layer 0 is what MPEG audio has no meaning for, and ADTS says.
        return "mp3" if head[1] & 0x06 else "aac"
    return None


def _refuse_opening(url: str, *_rest: object) -> None:
    raise AudioError("a recording that refers to another file is not read; send one that is whole")


class _Source:
    """A file object as a demuxer needs it; one of the standard library's has no name, but says
    that it had."""

    name = "recording"

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@dataclass
class _Recording:
    """A recording that can be decoded from its start, as often as is needed."""

    file: BinaryIO
    seconds: float
    name: str
    fix: str

    def decode(self) -> Iterator[tuple[int, Tensor]]:
        """Its sample rate and blocks float32 [channels, n].

        Raises:
            AudioError: it is no audio, damaged, or longer than `seconds`.
        """
        self.file.seek(0)
        kind = kind_of(self.file.read(16))
        self.file.seek(0)
        if kind is None:
            wanted = ", ".join(CONTAINERS)
            raise AudioError(f"{self.name} is no audio that is known; send one of {wanted}")
        try:
            with av.open(
                # FFmpeg neither guesses a format, which may be a playlist, nor opens anything.
                _Source(self.file),
                format=CONTAINERS[kind],
                io_open=_refuse_opening,
                metadata_errors="replace",
            ) as box:
                yield from self._blocks(box)
        except (av.error.FFmpegError, ValueError, OSError) as error:
            if isinstance(error, AudioError):
                raise
            problem = f"cannot decode {self.name} as {kind}"
            raise AudioError(f"{problem}; it is damaged or not what it seems") from error

    def _blocks(self, box: Any) -> Iterator[tuple[int, Tensor]]:
        if not box.streams.audio:
            raise AudioError(f"{self.name} has no sound in it")
        stream = box.streams.audio[0]
        if stream.codec_context is None or stream.codec_context.name not in CODECS:
            codec = "unknown" if stream.codec_context is None else stream.codec_context.name
            raise AudioError(f"{self.name} holds {codec} audio; send PCM, MP3, FLAC, Opus or AAC")
        stream.codec_context.thread_count = 1
        rate, samples, waiting, size = 0, 0, list[np.ndarray](), 0
        # Packed: PyAV reads beyond the planes of frames of eight channels.
        packed: _Filters | None = None
        for frame in _frames(box, stream, self.name):
            if rate == 0:
                rate = frame.sample_rate
                if frame.layout.nb_channels > MAX_CHANNELS:
                    problem = f"{self.name} has {frame.layout.nb_channels} channels"
                    raise AudioError(f"{problem}; mix it down to at most {MAX_CHANNELS}")
                form, layout = frame.format.name, frame.layout.name
                packed = _Filters(rate, form, layout, ("aformat", "sample_fmts=flt"))
            if frame.sample_rate != rate:
                raise AudioError(f"{self.name} changes its sample rate; export it again")
            assert packed is not None
            for part in packed.push(frame):
                block = part.to_ndarray().reshape(-1, part.layout.nb_channels).T
                waiting.append(block)
                size += block.shape[1]
                samples += block.shape[1]
            if samples > self.seconds * rate:
                problem = f"{self.name} is longer than {self.seconds:g} s"
                raise AudioError(f"{problem}; {self.fix}")
            if size >= BLOCK:
                yield rate, torch.from_numpy(np.concatenate(waiting, axis=1))
                waiting, size = [], 0
        if waiting:
            yield rate, torch.from_numpy(np.concatenate(waiting, axis=1))


def _frames(box: Any, stream: Any, name: str) -> Iterator[av.AudioFrame]:
    damaged = 0
    for packet in box.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError as error:
            # As players do; a recording that was cut off ends so.
            damaged += 1
            if damaged > DAMAGED:
                raise AudioError(f"{name} is damaged; export it again") from error


FIX = "cut it, or raise the server's --max-audio-seconds"


def decode_blocks(
    source: bytes | BinaryIO, rate: int, seconds: float, name: str = "the file", fix: str = FIX
) -> Iterator[Tensor]:
    """A client's recording in mono blocks float32 [n] at `rate`; memory does not grow with it.

    Args:
        source: encoded bytes, or a file object that can be sought in; never a path.
        seconds: how long it may be, counted while it is decoded.
        name: of the recording in errors.
        fix: what to do about one that is too long.

    Raises:
        AudioError: it cannot be decoded, holds no samples, or is too long.
    """
    file = BytesIO(source) if isinstance(source, bytes) else source
    recording = _Recording(file, seconds, name, fix)
    first = next(recording.decode(), None)
    if first is None:
        raise AudioError(f"{name} holds no samples")

    def read() -> Iterator[Tensor]:
        for _, block in recording.decode():
            yield block

    limits = DecodeLimits(seconds=seconds + 1, bytes=MOST_BYTES)
    yield from mixed_blocks(read, first[0], len(first[1]), rate, name, limits)


def decode(
    source: bytes | BinaryIO, rate: int, seconds: float, name: str = "the file", fix: str = FIX
) -> Tensor:
    """`decode_blocks` in one."""
    return torch.cat(list(decode_blocks(source, rate, seconds, name, fix)))


class Pulled(Generic[Result]):
    """An iterator whose items are made in threads, one after the other, when they are asked for.

    It holds a thread only while an item is made.
    """

    def __init__(self, pool: ThreadPoolExecutor, start: Callable[[], Iterator[Result]]) -> None:
        self._pool, self._start = pool, start
        self._iterator: Iterator[Result] | None = None
        self._lock, self._closed = threading.Lock(), False

    async def next(self) -> Result | None:
        """The next item; None after the last."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._next)

    def close(self) -> None:
        """Ends it once the item in progress is made; nobody waits."""
        self._closed = True
        with suppress(RuntimeError):
            self._pool.submit(self._close)

    def _next(self) -> Result | None:
        with self._lock:
            if self._closed:
                return None
            if self._iterator is None:
                self._iterator = self._start()
            return next(self._iterator, None)

    def _close(self) -> None:
        with self._lock:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                close()
            self._iterator = None


def _yield_to_listeners() -> None:
    """A recording that is read may wait; a thread has a priority of its own on Linux alone."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


class AudioThreads:
    """Threads that encode and decode; what one waits for is short."""

    def __init__(self) -> None:
        self._encoding = ThreadPoolExecutor(2, "mimo-fast encode")
        self._decoding = ThreadPoolExecutor(2, "mimo-fast decode", _yield_to_listeners)

    async def decode(
        self,
        function: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """The result of a function that reads what a client sent."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoding, lambda: function(*arguments, **named))

    def pull(self, start: Callable[[], Iterator[Result]]) -> Pulled[Result]:
        """The items of `start()`, for a recording that is read in parts."""
        return Pulled(self._decoding, start)

    async def push(self, encoder: Encoder, samples: Tensor) -> bytes:
        """`Encoder.push`."""
        if encoder.light:
            return encoder.push(samples)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoding, encoder.push, samples)

    async def finish(self, encoder: Encoder) -> AsyncGenerator[bytes, None]:
        """`Encoder.finish`."""
        loop, rest = asyncio.get_running_loop(), encoder.finish()
        while (part := await loop.run_in_executor(self._encoding, next, rest, None)) is not None:
            if part:
                yield part

    async def encode(
        self,
        audio: AsyncIterator[Tensor],
        form: str,
        rate: int,
        speed: float = 1.0,
        mark: bool = False,
    ) -> AsyncGenerator[bytes, None]:
        """Samples as they are made -> bytes of a form, see `Encoder`; none are empty."""
        encoder = Encoder(form, rate, speed, mark)
        try:
            async for samples in audio:
                if data := await self.push(encoder, samples):
                    yield data
            async for data in self.finish(encoder):
                yield data
        finally:
            encoder.close()

    def close(self) -> None:
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self._decoding.shutdown(wait=False, cancel_futures=True)
