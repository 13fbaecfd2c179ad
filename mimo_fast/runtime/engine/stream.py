"""Decoded groups -> text, spoken patches, and chunks of audio as they become final."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.device.host_copy import HostCopy
from mimo_fast.runtime.engine.engine import Reply
from mimo_fast.runtime.lm.decode import Group
from mimo_fast.text.tokenizer import Tokenizer

UNFINISHED_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Timing:
    """Times of a reply, in seconds since the request.

    Attributes:
        elapsed: Time at which the chunk was ready.
        prefill: Time at which the prompt had been prefilled.
        first_audio: Time at which the first samples were ready, None before them.
        groups: Number of groups decoded.
        audio_seconds: Duration of all audio returned.
    """

    elapsed: float
    prefill: float
    first_audio: float | None
    groups: int
    audio_seconds: float


@dataclass(frozen=True)
class Chunk:
    """The text and audio of one decoded group: audio float32 [n] on the CPU; each may be empty."""

    audio: Tensor
    sample_rate: int
    text: str
    timing: Timing


@dataclass
class ReplyReader:
    """Separates the text of a reply from its speech (upstream `forward`).

    Spoken patches are those between `<|sostm|>` and `<|eostm|>`. Without `<|sostm|>` every patch is
    spoken, without `<|eostm|>` all to the end. `<|empty|>`, `<|eot|>` and `<|eostm|>` are not text.
    They are dropped before detokenizing (upstream: after it), so that a character whose bytes are
    split by a patch stays whole.

    Args:
        speaking: whether the prompt itself ended in `<|sostm|>`.
    """

    tokenizer: Tokenizer
    speaking: bool
    _ended: bool = False
    _waiting: list[Tensor] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)

    def read(self, token: int, codes: Tensor) -> tuple[str, list[Tensor]]:
        """A group -> the text and the patches [C, G] that become final with it."""
        special = self.tokenizer.special
        if token == special.empty:
            if self.speaking:
                return "", [codes]
            if not self._ended:
                self._waiting.append(codes)
            return "", []
        if token == special.sostm and not self.speaking and not self._ended:
            self.speaking = True
            self._waiting.clear()
        elif token == special.eostm:
            self._ended = True
            spoken, self.speaking, self._waiting = self._waiting, False, []
            return "", spoken
        if token == special.eot:
            return "", []
        self._tokens.append(token)
        return self._flush(final=False), []

    def finish(self) -> tuple[str, list[Tensor]]:
        """The text and patches held back: half a character, and patches without a `<|sostm|>`."""
        return self._flush(final=True), self._waiting

    def _flush(self, final: bool) -> str:
        text = self.tokenizer.decode(self._tokens) if self._tokens else ""
        if text.endswith(UNFINISHED_CHARACTER) and not final:
            return ""
        self._tokens.clear()
        return text


class ChunkStream(Iterator[Chunk]):
    """Chunks of one reply. Any thread may take the next one or close the stream.

    Closing waits for the group in progress; no chunk follows.
    """

    def __init__(self, chunks: Generator[Chunk, None, None], reply: Reply) -> None:
        self._chunks, self._reply = chunks, reply
        self._lock = threading.RLock()

    def __next__(self) -> Chunk:
        with self._lock:
            return next(self._chunks)

    def close(self) -> None:
        with self._lock:
            self._chunks.close()
            self._reply.close()


def read_reply(groups: Iterator[Group], reader: ReplyReader) -> tuple[str, Tensor | None]:
    """Reads a whole reply, without the group that ends it: stripped text, codes [C, T] or None."""
    text, patches = [], []
    for group in groups:
        if not group.finished:
            words, spoken = reader.read(group.text, group.codes)
            text.append(words)
            patches += spoken
    words, spoken = reader.finish()
    patches += spoken
    return "".join([*text, words]).strip(), torch.cat(patches, dim=1) if patches else None


def stream_reply(
    reply: Reply,
    reader: ReplyReader,
    codec: Codec,
    began: float,
    speaks: bool = True,
    on_group: Callable[[Group], None] | None = None,
) -> ChunkStream:
    """One chunk a group, as soon as the group is decoded; the last one flushes the codec.

    Args:
        reply: a reply whose prompt has been prefilled.
        began: `time.perf_counter()` at the request, before the prefill.
        speaks: False returns text only.
        on_group: called with each group before its chunk is made.
    """
    times = began, time.perf_counter() - began
    reply.launches = True
    chunks = _generate_chunks(reply, reply.launch_next, reader, codec, *times, speaks, on_group)
    return ChunkStream(chunks, reply)


def _generate_chunks(
    groups: Iterable[Group],
    launch_next: Callable[[], None],
    reader: ReplyReader,
    codec: Codec,
    began: float,
    prefill: float,
    speaks: bool,
    on_group: Callable[[Group], None] | None,
) -> Generator[Chunk, None, None]:
    """The chunks of a reply's groups.

    The device gets, in this order: a group's codec chunk, the copy of its samples to the host, the
    next group. Then the host waits for the samples, and the device stays busy while the consumer
    handles them. The codec's chunk comes first, because behind the next group its samples would
    come one group later (7.0 ms with int4 on an H100) and the device would be no busier.
    """
    stream: CodecStream | None = None
    decoded, samples, first_audio = 0, 0, None

    def chunk(text: str, audio: Tensor) -> Chunk:
        nonlocal samples, first_audio
        copy = HostCopy(audio.float())
        launch_next()
        # The time is taken when the samples are on the host, not when the work is queued. The
        # clone frees the pinned memory, which is scarce.
        audio = copy.wait().clone()
        samples += len(audio)
        elapsed = time.perf_counter() - began
        if first_audio is None and len(audio):
            first_audio = elapsed
        timing = Timing(elapsed, prefill, first_audio, decoded, samples / codec.sample_rate)
        return Chunk(audio, codec.sample_rate, text, timing)

    nothing = torch.zeros(0)
    try:
        for group in groups:
            # Opened once the reply has a slot: graphs are captured for as many streams as slots.
            stream = stream or (codec.stream() if speaks else None)
            decoded += 1
            if on_group is not None:
                on_group(group)
            if not group.finished:
                text, patches = reader.read(group.text, group.codes)
                heard = nothing
                if stream and patches:
                    heard = stream.push(torch.cat(patches, dim=1), trusted=True)
                yield chunk(text, heard)
        text, patches = reader.finish()
        held = torch.cat(patches, dim=1) if patches else None
        yield chunk(text, stream.finish(held, trusted=True) if stream else nothing)
    finally:
        if stream is not None:
            stream.close()


async def iterate_async(start: Callable[[], ChunkStream]) -> AsyncIterator[Chunk]:
    """The chunks of `start()`, computed in worker threads, so that the event loop stays free.

    Leaving the loop or cancelling the task stops after the group in progress.
    """
    started = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        chunks = await asyncio.shield(started)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk
    finally:
        # Waits for the worker thread to finish its group or prefill, however often the task is
        # cancelled meanwhile.
        await asyncio.shield(_close(started))


async def _close(started: asyncio.Future[ChunkStream]) -> None:
    await asyncio.wait([started])
    if not started.cancelled() and started.exception() is None:
        await asyncio.to_thread(started.result().close)
