"""CUDA graphs of a codec stream that is fed patch by patch.

Four kinds of chunks have fixed shapes:

    first  the first decode: the codes held back for the look-ahead, and one patch more
    ramp   one patch while an elastic stream holds back more and more: half a patch becomes final
    next   one patch in steady state: each patch makes as many frames final as it adds
    last   no codes; makes all pending frames final, in steady state

Each is captured once per `CodecState` and `Schedule`, and replayed; only that state and the chunk's
input change, both in device memory: norm statistics too, whoever supplied them. One graph serves
all of a ramp, since it reads on the device how many frames are held back. Any other chunk (pushes
of another size, the end of a stream in its ramp, a short stream that is decoded again from its
start) runs kernel by kernel in the same buffers, before, between or after the graphs.

The codec keeps the states and lends them to its streams, because a capture takes as long as a few
patches.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, patch_rows, streamable
from mimo_fast.runtime.codec.incremental import VOCODER_BLOCK, decode_chunk
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.schedule import Schedule, usual_schedules
from mimo_fast.runtime.codec.state import WHOLE_UTTERANCE, CodecState, new_state
from mimo_fast.runtime.lm.graphs import Capture, CudaCapture


@dataclass(frozen=True)
class CapturedChunk:
    """One graph: its input, dequantized codes [T, D] float32, and its result, samples [m].

    Attributes:
        ended: Whether the chunk ends the stream.
        held: Where it reads how many vocoder frames are held back, int64 scalar; None where that
            number is fixed.
    """

    codes: Tensor
    ended: bool
    replay: Callable[[], None]
    result: Tensor
    held: Tensor | None = None


class ChunkGraphs:
    """The graphs of streams of one schedule, over one state."""

    def __init__(
        self, codec: CodecNetwork, state: CodecState, schedule: Schedule, capture: Capture
    ) -> None:
        self._state, self._schedule, self._capture = state, schedule, capture
        self._config = config = codec.config
        self._patch = patch = patch_rows(config)
        self._most = most = schedule.lookahead * patch
        # After `_begun` committed frames, no chunk trims samples at the start of the waveform.
        self._begun = begun = -(-state.trim // config.hop)
        self._first = self._captured(codec, schedule.hold + PATCH_FRAMES, frames=0, committed=0)
        # Twice as many frames as are held back end a ramp.
        steady, committed = begun + 2 * most, begun + most
        self._next = self._captured(codec, PATCH_FRAMES, steady, committed)
        self._last = self._captured(codec, 0, steady, committed, ended=True)
        self._ramp: CapturedChunk | None = None
        if schedule.elastic and most > patch >= begun and patch <= VOCODER_BLOCK:
            held = torch.tensor(patch, dtype=torch.int64, device=codec.device)
            self._ramp = self._captured(codec, PATCH_FRAMES, 2 * patch, patch, held=held)

    def advance(self, hidden: Tensor, ended: bool, lock: threading.Lock) -> Tensor | None:
        """`decode_chunk` by graph, its samples copied; None if no graph fits the chunk."""
        chunk, state = self._usual(len(hidden), ended), self._state
        if chunk is None:
            return None
        frames = state.frames + len(hidden) // PATCH_FRAMES * self._patch
        with lock:
            chunk.codes.copy_(hidden)
            if chunk.held is not None:
                chunk.held.fill_(state.frames - state.committed)
            chunk.replay()
            wav = chunk.result.clone()
        left = 0 if ended else self._schedule.rows(self._config, frames)
        state.frames, state.committed = frames, frames - left
        return wav

    def _usual(self, new: int, ended: bool) -> CapturedChunk | None:
        """The graph for a chunk of `new` code frames in the present state, if any."""
        state, chunk = self._state, None
        held = state.frames - state.committed
        if state.frames == state.committed == 0:
            chunk = self._first
        elif state.committed >= self._begun:
            left = self._schedule.rows(self._config, state.frames + self._patch)
            if held == self._most:
                chunk = self._last if ended else self._next
            elif held + self._patch - left == self._patch // 2:
                chunk = self._ramp
        if chunk is None or ended != chunk.ended or new != len(chunk.codes):
            return None
        # After a push that held most of an utterance, the norm statistics are not extrapolated.
        return chunk if ended or state.largest < WHOLE_UTTERANCE else None

    def _captured(
        self,
        codec: CodecNetwork,
        new: int,
        frames: int,
        committed: int,
        ended: bool = False,
        held: Tensor | None = None,
    ) -> CapturedChunk:
        """Captures a chunk of `new` code frames after `frames` vocoder frames."""
        codes = torch.zeros(new, codec.config.dim, device=codec.device, dtype=torch.float32)
        state, after = self._state, frames + new // PATCH_FRAMES * self._patch
        lookahead = self._schedule.rows(self._config, after)
        statistics = self._schedule.statistics(self._config, state)

        def run() -> Tensor:
            state.frames, state.committed = frames, committed
            return decode_chunk(codec, state, codes, lookahead, statistics, ended, held)

        return CapturedChunk(codes, ended, *self._capture(run), held=held)


class LentState:
    """The state of one stream, and its graphs by schedule.

    Args:
        patches: patches of vocoder frames that it keeps pending.
        lock: the codec's lock. Graphs share a memory pool, so a result is valid only until another
            graph runs; all run on one CUDA stream.
    """

    def __init__(
        self, codec: CodecNetwork, patches: int, capture: Capture, lock: threading.Lock
    ) -> None:
        self.patches, self.lock, self._capture = patches, lock, capture
        self.state = new_state(codec.config, patches, codec.dtype, codec.device)
        self._graphs: dict[Schedule, ChunkGraphs] = {}
        self._chosen: ChunkGraphs

    def follow(self, codec: CodecNetwork, schedule: Schedule) -> None:
        """Resets the state to the start of a stream; its graphs are captured the first time."""
        if schedule not in self._graphs:
            self.state.reset()
            graphs = ChunkGraphs(codec, self.state, schedule, self._capture)
            self._graphs[schedule] = graphs
        self.state.reset()
        self._chosen = self._graphs[schedule]

    def advance(self, hidden: Tensor, ended: bool) -> Tensor | None:
        """The next chunk of the stream by graph, see `ChunkGraphs.advance`."""
        return self._chosen.advance(hidden, ended, self.lock)


class StreamGraphs:
    """A pool of states with their graphs, lent to the streams of one codec.

    Args:
        capture: makes a graph of a function; CUDA graphs by default.
    """

    def __init__(self, codec: CodecNetwork, capture: Capture | None = None) -> None:
        self._codec = weakref.ref(codec)
        self._capture = capture or CudaCapture()
        self._lock = threading.Lock()
        schedules = usual_schedules(codec.config)
        # By patches pending. Only append and pop, which are atomic: `give_back` may run in a
        # garbage collection at any point, where taking a lock could deadlock.
        self._idle = {schedule.lookahead: list[LentState]() for schedule in schedules}
        self._kept = 1

    def serves(self, codec: CodecNetwork, schedule: Schedule) -> bool:
        """Whether a stream has a usual schedule, and the codec its own layers, on the device.

        A copy of the codec may have other layers.
        """
        stacks = codec.decoder, codec.vocoder
        resident = all(isinstance(stack.layers, tuple) for stack in stacks)
        own = codec is self._codec() and resident and streamable(codec.config)
        return own and schedule in usual_schedules(codec.config)

    def warmup(self, streams: int, progress: bool = True) -> None:
        """Captures until `streams` states are idle, and keeps that many from then on.

        Their graphs are those of exact streams and of elastic ones; others are captured when a
        stream first needs them.
        """
        codec = self._owner()
        exact, _, elastic = usual_schedules(codec.config)
        if not self.serves(codec, exact):
            return
        self._kept = max(self._kept, streams)
        missing = [
            patches
            for patches in dict.fromkeys((exact.lookahead, elastic.lookahead))
            for _ in range(len(self._idle[patches]), streams)
        ]
        # tqdm shows the bar only on a terminal.
        show = None if progress else True
        for patches in tqdm(missing, desc="capturing", unit="stream", leave=False, disable=show):
            schedules = [each for each in (elastic, exact) if each.lookahead == patches]
            self._idle[patches].append(self._captured(schedules))

    def take(self, schedule: Schedule) -> LentState:
        """A reset state from the pool, or a new one, captured now."""
        try:
            lent = self._idle[schedule.lookahead].pop()
        except IndexError:
            return self._captured([schedule])
        self._follow(lent, schedule)
        return lent

    def give_back(self, lent: LentState) -> None:
        idle = self._idle[lent.patches]
        if len(idle) < self._kept:
            idle.append(lent)

    # A state outlives the stream it is captured for, and so that caller's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self, schedules: Sequence[Schedule]) -> LentState:
        lent = LentState(self._owner(), schedules[0].lookahead, self._capture, self._lock)
        for schedule in schedules:
            self._follow(lent, schedule)
        return lent

    @torch.inference_mode(False)
    @torch.no_grad()
    def _follow(self, lent: LentState, schedule: Schedule) -> None:
        lent.follow(self._owner(), schedule)

    def _owner(self) -> CodecNetwork:
        codec = self._codec()
        assert codec is not None
        return codec
