"""Pools of rows of `StateTensors`, which streams of a codec borrow.

A pool takes and gives back memory as streams come and go. Counters on the host only say which
shapes a stream's next chunk has.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.runtime.codec.state import FORECAST, SETTLING, Rows, StateTensors, row_bytes


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
