"""What the engine delivers of a reply -> chunks of text and audio, for threads and for asyncio."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.runtime.codec.finite import samples_error
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.request import FinishReason
from mimo_fast.runtime.engine.voicing import Listening, ReplyReader, Voicing, nothing
from mimo_fast.runtime.lm.decode import Group

Judge = Callable[[Reply], tuple[float | None, str | None]]
"""A reply of which all has been taken -> confidence and warning."""


def _new_workers() -> None:
    global _workers
    _workers = ThreadPoolExecutor(256, thread_name_prefix="mimo-fast")


_workers: ThreadPoolExecutor
"""Threads of asynchronous streams. asyncio's own are few: streams that wait would fill them, and
then none could be closed."""

_new_workers()
# A child has none of its parent's threads, and would wait for them.
os.register_at_fork(after_in_child=_new_workers)

_task: ContextVar[asyncio.Task[Any] | None] = ContextVar("task", default=None)


def caller() -> asyncio.Task[Any] | threading.Thread:
    """Who asks: the asyncio task whose work a worker thread does, else the thread itself."""
    return _task.get() or threading.current_thread()


def is_active(caller: asyncio.Task[Any] | threading.Thread | None) -> bool:
    """Whether what `caller` returned may still ask for something."""
    if isinstance(caller, threading.Thread):
        return caller.is_alive()
    return caller is not None and not caller.done()


def is_read_by_another(
    running: "Reply | ChunkStream | None", owner: asyncio.Task[Any] | threading.Thread | None
) -> bool:
    """Whether a reply has not ended, and its owner is another one than who asks, and active."""
    ended = running is None or running.ended
    return not ended and owner is not caller() and is_active(owner)


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
    """The text and audio of one decoded group: audio float32 [n] on the CPU; each may be empty.

    Attributes:
        finish_reason: On the last chunk why the reply ended, else None.
        confidence, warning: On the last chunk as those of `ReplyText`, else None.
    """

    audio: Tensor
    sample_rate: int
    text: str
    timing: Timing
    finish_reason: FinishReason | None = None
    confidence: float | None = None
    warning: str | None = None


class ReplyText(str):
    """The text of a reply, and why it ended.

    Attributes:
        finish_reason: "stop" if the model ended the reply, "length" at max_new_tokens, "context" at
            the end of the context, "cancelled" if the caller ended it.
        confidence: From 0 to 1, how far a reply to a recording can be relied on; None where the
            checkpoint does not state how to tell.
        warning: A sentence for the user where the confidence is below what the checkpoint calls
            its own, else None.
    """

    finish_reason: FinishReason | None = None
    confidence: float | None = None
    warning: str | None = None


class ChunkStream(Iterator[Chunk]):
    """Chunks of one reply. Any thread may take the next one or close the stream.

    Closing waits for the group in progress; no chunk follows.
    """

    def __init__(
        self,
        chunks: Generator[Chunk, None, None],
        reply: Reply,
        voicing: Voicing,
        closing: threading.Event,
    ) -> None:
        self._chunks, self._reply, self._closing = chunks, reply, closing
        self._voicing = voicing
        self._lock = threading.RLock()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the reply ended; None while it has not, and after an error."""
        return self._reply.finish_reason

    @property
    def ended(self) -> bool:
        """Whether the reply has ended and all of it been taken."""
        return self._reply.ended

    def prefill(self) -> None:
        """Returns when the prompt has been prefilled, or the stream closed.

        Raises:
            Exception: the error that ended the reply.
        """
        self._reply.prefill()

    @property
    def orphaned(self) -> bool:
        """Whether this is a process that was forked from the one that decodes the reply."""
        return self._reply.orphaned

    def check(self) -> None:
        """Raises ClosedError in such a process."""
        self._reply.check()

    def __next__(self) -> Chunk:
        self.check()
        with self._lock:
            return next(self._chunks)

    def close(self) -> None:
        # First: a thread that waits for the next chunk holds the lock.
        self._closing.set()
        self._reply.cancel()
        if self._reply.orphaned:
            return
        with self._lock:
            self._chunks.close()
            # No step works on it after this.
            self._reply.close()
            self._voicing.close()


def read_reply(reply: Reply, reader: ReplyReader) -> tuple[ReplyText, Tensor | None]:
    """Reads a whole reply: stripped text, and codes [C, T] or None.

    The last group, which ends the reply, is not part of it.
    """
    words, patches = list[str](), list[Tensor]()
    for group in reply:
        if not group.finished:
            new, spoken = reader.read(group.text, group.codes)
            words.append(new)
            patches += spoken
    new, spoken = reader.finish()
    patches += spoken
    text = ReplyText("".join([*words, new]).strip())
    text.finish_reason = reply.finish_reason
    return text, torch.cat(patches, dim=1) if patches else None


def stream_reply(
    reply: Reply,
    reader: ReplyReader,
    codec: Codec,
    began: float,
    speaks: bool = True,
    on_group: Callable[[Group], None] | None = None,
    lookahead: Listening = "exact",
    voice: Voice | None = None,
    judge: Judge | None = None,
) -> ChunkStream:
    """One chunk a group, as soon as the group is decoded; the last one flushes the codec.

    The engine makes text and audio of the groups, see `Voicing`.

    Args:
        reply: a reply of which nothing has been taken.
        began: `time.perf_counter()` at the request.
        speaks: False returns text only.
        on_group: called with each group before its chunk is made.
        voice: that of the reply: what an elastic look-ahead begins with, and what a reply that
            comes to its end adds to.
        judge: gives the last chunk its confidence.
    """
    voicing = Voicing(reader, codec, speaks, lookahead, voice)
    reply.voiced_by(voicing)
    closing = threading.Event()
    chunks = _generate_chunks(reply, voicing, began, on_group, closing, voice, judge)
    return ChunkStream(chunks, reply, voicing, closing)


def _generate_chunks(
    reply: Reply,
    voicing: Voicing,
    began: float,
    on_group: Callable[[Group], None] | None,
    closing: threading.Event,
    voice: Voice | None,
    judge: Judge | None,
) -> Generator[Chunk, None, None]:
    """The chunks of what is delivered of a reply."""
    reply.prefill()
    prefill, codec = (reply.prefilled or began) - began, voicing.codec
    decoded, samples, frames, first_audio = 0, 0, 0, None

    def chunk(text: str, audio: Tensor, codes: Tensor | None, reason: FinishReason | None) -> Chunk:
        nonlocal samples, frames, first_audio
        samples += len(audio)
        frames += 0 if codes is None else codes.shape[1]
        elapsed = perf_counter() - began
        if first_audio is None and len(audio):
            first_audio = elapsed
        timing = Timing(elapsed, prefill, first_audio, decoded, samples / codec.sample_rate)
        return Chunk(audio, codec.sample_rate, text, timing, reason)

    last: Chunk | None = None
    while last is None:
        try:
            delivery = reply.take()
            if delivery is None:
                break
            if not delivery.finite:
                codes = delivery.codes
                unknown = codes is not None and bool((codes == NOT_FINITE).any())
                raise reply.not_finite() if unknown else samples_error(codec, codes)
            decoded += 1
            if on_group is not None:
                on_group(delivery.group)
            audio = nothing() if delivery.audio is None else delivery.audio
            reason = reply.finish_reason if delivery.group.finished else None
            made = chunk(delivery.text, audio, delivery.codes, reason)
        except Exception:
            reply.close()
            voicing.close()
            raise
        if delivery.group.finished:
            last = made
        else:
            yield made
    reply.close()
    if closing.is_set():
        return
    if last is None:
        # It was ended by somebody else: what has been taken of it is heard to its end.
        with reply.exclusive():
            text, audio = voicing.cut(frames, samples)
        if not bool(audio.isfinite().all()):
            raise samples_error(codec, None)
        last = chunk(text, audio, None, reply.finish_reason)
    if voice is not None and voicing.totals is not None:
        voice.add(codec, voicing.totals)
    confidence, warning = judge(reply) if judge is not None else (None, None)
    yield replace(last, confidence=confidence, warning=warning)


async def iterate_async(start: Callable[[], ChunkStream]) -> AsyncIterator[Chunk]:
    """The chunks of `start()`, computed in worker threads, so that the event loop stays free.

    Leaving the loop or cancelling the task stops after the group in progress.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    context.run(_task.set, asyncio.current_task())
    started = loop.run_in_executor(_workers, context.run, start)
    try:
        chunks = await asyncio.shield(started)
        while (chunk := await loop.run_in_executor(_workers, next, chunks, None)) is not None:
            yield chunk
    finally:
        await _to_its_end(_close(started))


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Waits for work, however often the task is cancelled meanwhile; it is cancelled after it."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


async def _close(started: asyncio.Future[ChunkStream]) -> None:
    await asyncio.wait([started])
    if not started.cancelled() and started.exception() is None:
        await asyncio.get_running_loop().run_in_executor(_workers, started.result().close)
