"""The state of incremental decodes: a pool of rows, one a stream, of fixed size each.

Positions and sums are tensors on the device and every row is updated in place, so that one
computation, or a captured graph, serves any rows of a pool. Counters on the host only say which
shapes a chunk has. A pool takes and gives back memory as streams come and go.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.runtime.codec.geometry import conv_overlap, patch_rows

CONTEXT = 512
"""Context of a decoder position: 512 positions, 256 code frames, 10.24 s (upstream: 250 frames)."""

BLOCK = 64
"""Largest number of decoder positions computed at once; longer pushes go block by block."""

FORECAST = 200
"""Expected minimum length of an utterance in code frames: 8 s."""

WHOLE_UTTERANCE = 150
"""Code frames of a push that is taken for most of an utterance: no extrapolation after it."""

RESTART_LIMIT = CONTEXT // 2
"""Code frames up to which a stream may be decoded again: a position still sees all of them."""

SETTLING = 2000
"""A stream of n code frames is decoded again once n^2 / SETTLING of them are new.

Statistics over n frames change ever less. While a stream grows from 44 frames to 256, at most
SETTLING ln(256 / 44) = 3522 frames are decoded again; docs/LOG.md has times and figures.
"""

ELASTIC_SETTLING = 125
"""SETTLING of an elastic stream.

What it begins with counts for more than what it learns, and its first samples are out before that:
decoding nano's speech sixteen times as often is worth 0.10 dB on average and 0.23 dB at most
(`benchmarks/results/2026-11-29-settling-2.json`).
"""

LINE = 64
"""Bytes of a cache line, on the boundary of which state begins."""

MeanVariance = tuple[Tensor, Tensor]
"""Mean and variance, float32 scalars."""


class NormStatistics(NamedTuple):
    """Mean and variance of each norm over time; `unpool` is None where the codec does not pool."""

    unpool: MeanVariance | None
    to_mel: MeanVariance


class StackState(NamedTuple):
    """Rotated keys and values that later positions of a stack see: [rows, layers, H, S, Dh] each.

    A single row's are without the first dimension.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class StateTensors:
    """Rows of state; the newest P vocoder frames of each are pending and may still change.

    Args:
        position: number of decoder positions done, int64 [rows]; slot p % S of `decoder` holds
            position p.
        entered: inputs of the decoder's layers for the pending frames, before the norm over time
            [rows, P / stride, D].
        added: what the layers added to them, float32 [rows, P / stride, D].
        history: normed outputs of the decoder before the pending ones, which the next convolution
            still reads [rows, positions, D].
        unpool, to_mel: sums of the norms over time, see `norms.py`, float64 [rows, 2, 3]; those of
            `to_mel` are without the pending frames.
        decoder: keys and values of the decoder's layers, a ring buffer.
        frame: number of vocoder frames so far, int64 [rows].
        vocoder: keys and values of the vocoder frames before the pending ones.
        tail: sums of windowed frames and of squared windows that later frames add to
            [rows, 2, n_fft - hop].
        given: norm statistics that a stream was given, float32 [rows, 2, 2]: of `unpool` and
            `to_mel`, mean and variance of each.
        prior: sums of earlier rows that count as if they preceded the stream's, float64
            [rows, 2, 3] of `unpool` and `to_mel`, each as a row of their `sums`; 0 for none.
        expected: rows of `unpool` and `to_mel` up to which missing ones are extrapolated, int64
            [rows, 2]; 0 for none.
    """

    position: Tensor
    entered: Tensor
    added: Tensor
    history: Tensor
    unpool: Tensor
    decoder: StackState
    to_mel: Tensor
    frame: Tensor
    vocoder: StackState
    tail: Tensor
    given: Tensor
    prior: Tensor
    expected: Tensor

    @classmethod
    def allocate(
        cls,
        config: CodecConfig,
        lookahead: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StateTensors:
        """lookahead: patches that a stream holds back at most."""
        stride = config.decoder_stride
        positions = pending_frames(config, lookahead) // stride
        history = -(-conv_overlap(config.decoder_kernel, stride) // stride)

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return untouched_zeros((rows, *shape), of, device)

        def stack(layers: int, heads: int, width: int, size: int) -> StackState:
            shape = layers, heads, size, width // heads
            return StackState(zeros(*shape), zeros(*shape))

        context = decoder_context(config.decoder_window) + BLOCK
        decoder = config.decoder_layers, config.decoder_heads, config.dim
        vocoder = config.vocoder_layers, config.vocoder_heads, config.vocoder_dim
        return cls(
            position=zeros(of=torch.int64),
            entered=zeros(positions, config.dim),
            added=zeros(positions, config.dim, of=torch.float32),
            history=zeros(history, config.dim),
            unpool=zeros(2, 3, of=torch.float64),
            decoder=stack(*decoder, context),
            to_mel=zeros(2, 3, of=torch.float64),
            frame=zeros(of=torch.int64),
            vocoder=stack(*vocoder, config.vocoder_window[0]),
            tail=zeros(2, config.n_fft - config.hop, of=torch.float32),
            given=zeros(2, 2, of=torch.float32),
            prior=zeros(2, 3, of=torch.float64),
            expected=zeros(2, of=torch.int64),
        )

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name; those of a stack are `decoder_k` and so on."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, StackState):
                yield f"{each.name}_k", value.k
                yield f"{each.name}_v", value.v
            else:
                yield each.name, value

    def each(self, change: Callable[[Tensor], Tensor]) -> StateTensors:
        """All tensors changed."""

        def changed(value: Any) -> Any:
            return (
                StackState(*map(change, value)) if isinstance(value, StackState) else change(value)
            )

        return StateTensors(*(changed(getattr(self, each.name)) for each in fields(self)))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.named())


def pending_frames(config: CodecConfig, lookahead: int) -> int:
    """P: vocoder frames that a stream with so many patches of look-ahead keeps pending."""
    stride = config.decoder_stride
    reach = -(-config.vocoder_layers * config.vocoder_window[1] // stride) * stride
    return max(reach, lookahead * patch_rows(config))


def row_bytes(config: CodecConfig, lookahead: int, dtype: torch.dtype) -> int:
    """Bytes of one stream's state."""
    return StateTensors.allocate(config, lookahead, 1, dtype, torch.device("meta")).nbytes


def integers(values: Sequence[Any], device: torch.device) -> Tensor:
    """int64 on the device; the host does not wait for it."""
    host = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def first_of(numbers: Sequence[int]) -> int | None:
    """The first of consecutive numbers, else None."""
    consecutive = [*numbers] == [*range(numbers[0], numbers[0] + len(numbers))]
    return numbers[0] if consecutive else None


@dataclass(frozen=True)
class Rows:
    """Rows of a pool that are computed together.

    Attributes:
        numbers: int64 [N] on the device.
        first: The first of them where they are consecutive, and read and written in place; None
            where they are not, or where a graph reads the numbers.
    """

    numbers: Tensor
    first: int | None = None

    @classmethod
    def of(cls, numbers: list[int], device: torch.device) -> Rows:
        return cls(integers(numbers, device), first_of(numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, tensor: Tensor) -> Tensor:
        """These rows [N, ...]: a copy, or a view."""
        if self.first is None:
            return tensor.index_select(0, self.numbers)
        return tensor.narrow(0, self.first, len(self))

    def write(self, tensor: Tensor, values: Tensor) -> None:
        if self.first is None:
            tensor.index_copy_(0, self.numbers, values)
        else:
            tensor.narrow(0, self.first, len(self)).copy_(values)

    def rewind(self, state: StateTensors) -> None:
        """Resets all but the waveform so far, to decode the codes again from the first."""
        for name, tensor in state.named():
            if name not in ("tail", "given", "prior", "expected"):
                self._zero(tensor)

    def reset(self, state: StateTensors) -> None:
        """Resets to the start of a waveform, with the same knowledge of norms."""
        self.rewind(state)
        self._zero(state.tail)

    def _zero(self, tensor: Tensor) -> None:
        if self.first is None:
            tensor.index_fill_(0, self.numbers, 0)
        else:
            tensor.narrow(0, self.first, len(self)).zero_()


@dataclass(eq=False)
class CodecState:
    """One waveform in progress: a row of a pool, and what the host knows of it.

    Args:
        row: its number, which changes where the pool shrinks.
        totals: sums of the last waveform that was finished, see `prior.totals`; None if it had no
            codes.
        committed: number of vocoder frames that are in the waveform.
        frames: number of vocoder frames so far.
        held: dequantized codes held back until the first samples can be final.
        past: all dequantized codes of a short stream, to decode it again from the start.
        largest: code frames of the largest push.
        again: code frames up to which the stream is decoded again as it grows; 0 for none.
        settling: how often, see `SETTLING`.
        decoded: code frames when it was last decoded from the start.
    """

    pool: CodecPool
    row: int
    totals: Tensor | None = None
    committed: int = 0
    frames: int = 0
    held: list[Tensor] = field(default_factory=list)
    past: list[Tensor] = field(default_factory=list)
    largest: int = 0
    again: int = 0
    settling: int = SETTLING
    decoded: int = 0

    @property
    def tensors(self) -> StateTensors:
        """Those of its pool."""
        return self.pool.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of its row, and of codes held."""
        return self.pool.row_bytes + sum(tensor.nbytes for tensor in (*self.held, *self.past))

    def decode_again(self, frames: int, settling: int) -> None:
        """Sets, before the first codes, up to how many code frames are decoded again; 0 for none.

        It replaces the forecast.

        Args:
            settling: how often, see `SETTLING`.
        """
        self.again, self.settling = frames, settling
        expected = self.tensors.expected[self.row]
        rows = self.pool.config.pool * (0 if frames else FORECAST)
        expected[0] = rows
        expected[1] = rows * self.pool.config.decoder_stride

    def begin(self) -> None:
        """Counts from the start of a waveform; whoever calls it resets the row."""
        self.committed = self.frames = self.largest = self.decoded = 0
        self.held.clear()
        self.past.clear()


class CodecPool:
    """State of streams that hold back as much: rows [capacity + 1, ...], the last one scratch.

    The scratch row pads a graph's rows; nobody reads what becomes of it. Without `fixed` the pool
    grows by half when a stream finds no row, and shrinks when a quarter is in use; without streams
    it has no memory. Rows may move then, so every use of them holds `lock`. To move those of many
    streams takes as long as a few steps (nano: 140 ms for 42), so on a CPU there are as many from
    the beginning as streams are expected: rows that no stream has used yet have no memory.

    Args:
        lookahead: patches that its streams hold back at most.
        lock: that of the codec.
        fixed: number of rows that is kept, for graphs, which read fixed addresses; 0 for none.
    """

    def __init__(
        self,
        config: CodecConfig,
        lookahead: int,
        dtype: torch.dtype,
        device: torch.device,
        lock: threading.Lock,
        fixed: int = 0,
    ) -> None:
        self._form = config, lookahead, dtype, device
        self.config = config
        self.row_bytes = row_bytes(config, lookahead, dtype)
        self.lookahead, self.fixed, self.device, self.lock = lookahead, fixed, device, lock
        self._expected = 0
        self.lent: list[CodecState] = []
        self._returned: list[CodecState] = []
        self.capacity = 0
        self.tensors: StateTensors
        self.native: Any = None
        """The native view of its tensors, of whoever computes natively; None where they are new."""
        self._allocate(fixed)

    @property
    def used(self) -> int:
        """Rows that are lent."""
        return len(self.lent) - len(self._returned)

    @property
    def scratch(self) -> int:
        """Number of the row that pads a graph's."""
        return self.fixed

    @property
    def nbytes(self) -> int:
        return self.tensors.nbytes

    def expect(self, streams: int) -> None:
        """Makes room for so many streams at once when the first one comes; the lock is held."""
        self._expected = streams if self.device.type == "cpu" else 0

    def take(self) -> CodecState:
        """A state at the start of a waveform, that knows nothing; the lock is held."""
        self._collect()
        if len(self.lent) == self.capacity:
            assert not self.fixed
            self._move(max(self.capacity + max(1, self.capacity // 2), self._expected))
        used = {state.row for state in self.lent}
        state = CodecState(self, next(i for i in range(self.capacity) if i not in used))
        self.lent.append(state)
        Rows.of([state.row], self.device).reset(self.tensors)
        return state

    def give_back(self, state: CodecState) -> None:
        """Takes a row back, at once or when the lock is free.

        It may run in a garbage collection at any point, where waiting for a lock could deadlock.
        """
        self._returned.append(state)
        while self._returned and self.lock.acquire(blocking=False):
            try:
                self._collect()
                self._shrink()
            finally:
                self.lock.release()

    def _collect(self) -> None:
        while self._returned:
            self.lent.remove(self._returned.pop())

    def _shrink(self) -> None:
        fewer = max(2 * len(self.lent), self._expected) if self.lent else 0
        if not self.fixed and 4 * len(self.lent) <= self.capacity and fewer < self.capacity:
            self._move(fewer)

    def _move(self, capacity: int) -> None:
        """Moves all rows in use to the first ones of another size."""
        before, states = self.tensors, sorted(self.lent, key=lambda state: state.row)
        numbers = [state.row for state in states]
        self._allocate(capacity)
        if states:
            rows, places = (
                Rows.of(numbers, self.device),
                Rows.of([*range(len(states))], self.device),
            )
            for (_, here), (_, there) in zip(before.named(), self.tensors.named(), strict=True):
                places.write(there, rows.read(here))
        for row, state in enumerate(states):
            state.row = row

    # Memory outlives the stream it is made for, and so that caller's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _allocate(self, capacity: int) -> None:
        config, lookahead, dtype, device = self._form
        rows = capacity + 1 if self.fixed else capacity
        self.tensors = StateTensors.allocate(config, lookahead, rows, dtype, device)
        self.capacity, self.native = capacity, None


class CodecPools:
    """The pools of a codec, one for each length of look-ahead, and the lock of all its state.

    Attributes:
        expected: Streams at once, as far as is known.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.expected = 0
        self._pools: dict[Any, CodecPool] = {}

    def __reduce__(self) -> tuple[type[CodecPools], tuple[()]]:
        # A copy of a codec has streams of its own.
        return CodecPools, ()

    def of(
        self, config: CodecConfig, lookahead: int, dtype: torch.dtype, device: torch.device
    ) -> CodecPool:
        """The pool of streams that hold back so many patches at most; the lock is held."""
        form = config, lookahead, dtype, device
        if form not in self._pools:
            self._pools[form] = CodecPool(*form, self.lock)
        self._pools[form].expect(self.expected)
        return self._pools[form]


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU memory is taken as they are written."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + LINE, dtype=np.uint8))
    start = -memory.data_ptr() % LINE
    return memory[start : start + size].view(dtype).view(*shape)


def decoder_context(window: tuple[int, int]) -> int:
    """Positions before its own that a position sees: the window's left side, at most CONTEXT."""
    return min(window[0], CONTEXT) if window[0] >= 0 else CONTEXT
