"""Chunks of several streams, decoded in one call.

Of a small codec on a CPU they are one native call, whatever their shapes, and each stream's samples
are those that it has alone, bit for bit. Elsewhere chunks of the same `Shape` in one pool are one
computation, or the replay of one graph; samples are those that a stream has alone up to the order
of sums, where a library chooses it by the number of rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mimo_fast.kernels.cpu.codec_decoder import Chunk as NativeChunk
from mimo_fast.kernels.cpu.codec_decoder import CodecDecoder
from mimo_fast.kernels.cpu.library import one_thread
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.runtime.codec.finite import checked_samples
from mimo_fast.runtime.codec.fused import buffers_of, fused_decoder
from mimo_fast.runtime.codec.geometry import vocoder_frames
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.incremental import RowNumbers, Shape, codes_to_decode, decode_rows
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.pools import CodecPool, CodecState
from mimo_fast.runtime.codec.prior import totals
from mimo_fast.runtime.codec.schedule import Known, Schedule
from mimo_fast.runtime.codec.state import WHOLE_UTTERANCE, Rows, first_of, integers

NATIVE = "_native_decoder"
"""Attribute of a codec that holds its native decoder; a copy with other layers makes its own."""

MOST_ROWS = 256
"""Streams in one computation at most."""


class Stream(Protocol):
    """A `CodecStream`."""

    codec: CodecNetwork
    schedule: Schedule

    def state(self) -> CodecState:
        """Its row. Raises ValueError if it is closed."""
        ...


@dataclass(frozen=True)
class Push:
    """The next codes of a stream.

    Attributes:
        codes: [n, T], inside their codebooks; None for none.
        ended: Whether no codes follow: the result is then all that is held back, and the stream is
            reset.
    """

    stream: Stream
    codes: Tensor | None
    ended: bool = False


@dataclass(frozen=True)
class Chunk:
    """What is decoded of a push.

    Attributes:
        place: The push's place among those of the call.
        hidden: Dequantized codes [T, D].
        lookahead: Vocoder frames that are held back after it.
    """

    place: int
    state: CodecState
    hidden: Tensor
    known: Known
    lookahead: int
    shape: Shape

    @property
    def settled(self) -> bool:
        """Whether its norms extrapolate no rows."""
        return self.shape.ended or self.state.largest >= WHOLE_UTTERANCE

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """Its row, and a column of `RowNumbers`."""
        state = self.state
        held = (0 if self.shape.anew else state.frames) - state.committed
        return state.row, held, self.known, self.settled


def threads_of(codec: CodecNetwork) -> AbstractContextManager[None]:
    """Keeps to one thread where that is fastest."""
    return one_thread() if codec.decoder.fused else nullcontext()


def advance(
    codec: CodecNetwork, graphs: StreamGraphs | None, pushes: Sequence[Push]
) -> list[Tensor | Exception]:
    """The result of each push, see `Codec.advance`.

    Raises:
        ValueError: a stream has two pushes.
    """
    codec.owner.check()
    if len({id(push.stream) for push in pushes}) < len(pushes):
        raise ValueError("a stream has two pushes in one call: join their codes")
    empty = torch.zeros(0, dtype=torch.float32, device=codec.device)
    results: list[Tensor | Exception] = [empty] * len(pushes)
    with codec.pools.lock, threads_of(codec):
        chunks = [*_chunks(codec, pushes, results)]
        native = native_decoder(codec) if graphs is None else None
        groups = dict[Any, list[Chunk]]()
        for chunk in chunks:
            alike = None if native else (id(chunk.state.pool), chunk.shape)
            groups.setdefault(alike, []).append(chunk)
        for group in groups.values():
            if native is None:
                _decode_group(codec, graphs, group, results)
            else:
                _decode_natively(codec, native, group, results)
    _check(codec, pushes, results)
    return results


def _check(codec: CodecNetwork, pushes: Sequence[Push], results: list[Tensor | Exception]) -> None:
    """Where samples on the host are not finite, writes an error in their place."""
    made = [wav for wav in results if isinstance(wav, Tensor) and len(wav)]
    # One look at all of them costs less than one at each.
    if codec.device.type != "cpu" or not made or bool(torch.cat(made).isfinite().all()):
        return
    for place, (push, wav) in enumerate(zip(pushes, results, strict=True)):
        try:
            if isinstance(wav, Tensor):
                checked_samples(codec, wav, push.codes)
        except Exception as error:
            results[place] = error


def _chunks(
    codec: CodecNetwork, pushes: Sequence[Push], results: list[Tensor | Exception]
) -> Iterator[Chunk]:
    """What is to be decoded now; writes errors to the results."""
    for place, (push, hidden) in enumerate(zip(pushes, _dequantized(codec, pushes), strict=True)):
        try:
            if push.stream.codec is not codec:
                raise ValueError("the stream is another codec's: advance it by that one")
            if isinstance(hidden, Exception):
                raise hidden
            chunk = _chunk(codec, place, push, hidden)
        except Exception as error:
            results[place] = error
            continue
        if chunk is not None:
            yield chunk
        elif push.ended:
            # Nothing has been decoded, so its row is as it was at the start.
            state = push.stream.state()
            state.totals = None
            state.begin()


def _dequantized(codec: CodecNetwork, pushes: Sequence[Push]) -> list[Tensor | Exception | None]:
    """Dequantized codes [T, D] of each push; those of as many codebooks are gathered at once."""
    found: list[Tensor | Exception | None] = [None] * len(pushes)
    alike = dict[tuple[int, torch.device, torch.dtype], list[int]]()
    for place, push in enumerate(pushes):
        if push.codes is not None:
            form = len(push.codes), push.codes.device, push.codes.dtype
            alike.setdefault(form, []).append(place)
    for places in alike.values():
        codes = [each.codes for each in map(pushes.__getitem__, places) if each.codes is not None]
        try:
            joined = codes[0] if len(codes) == 1 else torch.cat(codes, dim=1)
            parts = codec.dequantize(joined).split([each.shape[1] for each in codes])
            found = [*found]
            for place, part in zip(places, parts, strict=True):
                found[place] = part
        except Exception:
            for place, each in zip(places, codes, strict=True):
                found[place] = _dequantized_alone(codec, each)
    return found


def _dequantized_alone(codec: CodecNetwork, codes: Tensor) -> Tensor | Exception:
    try:
        return codec.dequantize(codes)
    except Exception as error:
        return error


def _chunk(codec: CodecNetwork, place: int, push: Push, hidden: Tensor | None) -> Chunk | None:
    """What is to be decoded of a stream now, if anything."""
    state, schedule = push.stream.state(), push.stream.schedule
    if hidden is not None and len(hidden):
        state.held.append(hidden)
        state.largest = max(state.largest, len(hidden))
    waiting = sum(map(len, state.held))
    # Codes are held back until the first sample can be final: decoding them earlier would not
    # return audio sooner, and waiting gives the norm statistics more rows.
    if not push.ended and (waiting == 0 or (state.frames == 0 and waiting <= schedule.hold)):
        return None
    if state.frames == 0 and waiting == 0:
        return None
    if len(state.held) == 1:
        new = state.held[0]
    else:
        new = torch.cat([*state.held, codec.codebooks.books[0].new_zeros(0, codec.config.dim)])
    state.held.clear()
    anew = False
    # An elastic stream begins with so few codes that its first patches would seem large.
    if schedule.known is not Known.GIVEN and (state.again or not schedule.elastic):
        # An elastic stream holds so little back that its end does not gain by it.
        new, anew = codes_to_decode(state, new, push.ended and not schedule.elastic)
    before = 0 if anew else state.frames
    counts = (before, state.committed), len(new), anew, push.ended
    shape = Shape.of(codec.config, schedule, *counts)
    rows = schedule.rows(codec.config, before + vocoder_frames(codec.config, len(new)))
    return Chunk(place, state, new, schedule.known, rows, shape)


def native_decoder(codec: CodecNetwork) -> CodecDecoder | None:
    """What decodes all chunks of a call natively; None where plain torch must.

    It is made once for the layers that the codec has.
    """
    stacks = codec.decoder, codec.vocoder
    if not all(stack.fused for stack in stacks):
        return None
    made = vars(codec).get(NATIVE)
    if made is None or any(map(operator.is_not, made[0], stacks)):
        made = vars(codec)[NATIVE] = stacks, fused_decoder(codec)
    return made[1]


def _decode_natively(
    codec: CodecNetwork,
    decoder: CodecDecoder,
    chunks: Sequence[Chunk],
    results: list[Tensor | Exception],
) -> None:
    """Decodes chunks of any shapes in one call."""
    asked = []
    for chunk in chunks:
        state, pool = chunk.state, chunk.state.pool
        pool.native = pool.native or buffers_of(pool.tensors)
        frames = 0 if chunk.shape.anew else state.frames
        counts = frames, state.committed, chunk.lookahead, int(chunk.known)
        flags = chunk.shape.ended, chunk.settled
        hidden = chunk.hidden.contiguous()
        asked.append(NativeChunk(pool.native, state.row, hidden, *counts, *flags))
    try:
        codec.calls += 1
        found = decoder.decode(asked)
    except Exception as error:
        for chunk in chunks:
            results[chunk.place] = error
        return
    for chunk, (samples, frames, committed) in zip(chunks, found, strict=True):
        results[chunk.place] = samples
        state = chunk.state
        state.frames, state.committed = frames, committed
        if chunk.shape.ended:
            rows = Rows.of([state.row], codec.device)
            (state.totals,) = totals(state.tensors, rows)
            state.begin()


def _decode_group(
    codec: CodecNetwork,
    graphs: StreamGraphs | None,
    chunks: Sequence[Chunk],
    results: list[Tensor | Exception],
) -> None:
    """Decodes chunks of one pool and shape, as many at once as may be."""
    pool, shape = chunks[0].state.pool, chunks[0].shape
    replays = None if graphs is None else graphs.of(pool, shape)
    most = most_rows(codec) if replays is None else replays.buckets[-1]
    for start in range(0, len(chunks), most):
        part = chunks[start : start + most]
        try:
            codec.calls += 1
            numbers = [chunk.numbers for chunk in part]
            hidden = [chunk.hidden for chunk in part]
            if replays is not None:
                waves = replays.run(codec, shape, numbers, hidden)
            else:
                table = integers([*zip(*numbers, strict=True)], codec.device)
                rows = Rows(table[0], first_of([row for row, *_ in numbers]))
                codes, values = torch.stack(hidden), RowNumbers(table[1:])
                waves = decode_rows(codec, pool.tensors, rows, codes, values, shape)
            _count(codec, pool, part)
        except Exception as error:
            for chunk in part:
                results[chunk.place] = error
            continue
        for chunk, wav in zip(part, waves, strict=True):
            results[chunk.place] = wav


def _count(codec: CodecNetwork, pool: CodecPool, chunks: Sequence[Chunk]) -> None:
    """Counts what has been decoded; streams that have ended begin anew."""
    shape = chunks[0].shape
    for chunk in chunks:
        state, new = chunk.state, vocoder_frames(codec.config, shape.codes)
        state.frames = new if shape.anew else state.frames + new
        state.committed += shape.decided
    if not shape.ended:
        return
    rows = Rows.of([chunk.state.row for chunk in chunks], codec.device)
    for chunk, sums in zip(chunks, totals(pool.tensors, rows), strict=True):
        chunk.state.totals = sums
        chunk.state.begin()
    rows.reset(pool.tensors)


def most_rows(codec: CodecNetwork) -> int:
    """Streams that are computed at once without a graph."""
    small = codec.decoder.fused or codec.vocoder.fused
    return MOST_ROWS if enabled(NewPath.CODEC_ROWS, codec.device) and not small else 1
