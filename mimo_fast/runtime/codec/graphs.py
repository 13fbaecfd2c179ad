"""CUDA graphs of a codec stream that is fed patch by patch.

Three kinds of chunks have fixed shapes:

    first  the first decode: the codes held back for the look-ahead, and one patch more
    next   one patch in steady state: each patch makes as many frames final as it adds
    last   no codes; makes all pending frames final

Each is captured once per `CodecState` and replayed; only that state and the chunk's input change,
both in device memory. Any other chunk (pushes of another size, a short stream that is decoded again
from its start) runs kernel by kernel in the same buffers, before, between or after the graphs.

The codec keeps the states and lends them to its streams, because a capture takes as long as a few
patches.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, default_lookahead, patch_rows, streamable
from mimo_fast.runtime.codec.incremental import decode_chunk
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.state import WHOLE_UTTERANCE, NormStatistics, Prior, new_state
from mimo_fast.runtime.lm.graphs import Capture, CudaCapture


@dataclass(frozen=True)
class CapturedChunk:
    """One graph: its input, dequantized codes [T, D] float32, and its result, samples [m].

    Attributes:
        ended: Whether the chunk ends the stream.
    """

    codes: Tensor
    ended: bool
    replay: Callable[[], None]
    result: Tensor


class ChunkGraphs:
    """The state of one stream and its graphs, for the codec's own look-ahead and prior.

    Args:
        lock: the codec's lock. Graphs share a memory pool, so a result is valid only until another
            graph runs; all run on one CUDA stream.
    """

    def __init__(self, codec: CodecNetwork, capture: Capture, lock: threading.Lock) -> None:
        config, patches = codec.config, default_lookahead(codec.config)
        self.state = new_state(config, patches, codec.dtype, codec.device)
        self._capture, self._lock = capture, lock
        self._rate = config.pool * config.decoder_stride
        self._lookahead = patches * patch_rows(config)
        # After `_begun` committed frames, no chunk trims samples at the start of the waveform.
        self._begun = -(-self.state.trim // config.hop)
        steady = self._begun + self._lookahead
        self._first = self._captured(codec, (patches + 1) * PATCH_FRAMES, frames=0, committed=0)
        self._next = self._captured(codec, PATCH_FRAMES, steady, self._begun)
        self._last = self._captured(codec, 0, steady, self._begun, ended=True)
        self.state.reset()

    def advance(self, hidden: Tensor, ended: bool) -> Tensor | None:
        """`decode_chunk` by graph, its samples copied; None if no graph fits the chunk."""
        chunk, state = self._usual(len(hidden), ended), self.state
        if chunk is None:
            return None
        frames = state.frames + len(hidden) * self._rate
        with self._lock:
            chunk.codes.copy_(hidden)
            chunk.replay()
            wav = chunk.result.clone()
        state.frames, state.committed = frames, frames if ended else frames - self._lookahead
        return wav

    def _usual(self, new: int, ended: bool) -> CapturedChunk | None:
        """The graph for a chunk of `new` code frames in the present state, if any."""
        state = self.state
        if state.frames == state.committed == 0:
            chunk = self._first
        elif state.committed >= self._begun and state.frames - state.committed == self._lookahead:
            chunk = self._last if ended else self._next
        else:
            return None
        # After a push that held most of an utterance, the norm statistics are not extrapolated.
        forecast = ended or state.largest < WHOLE_UTTERANCE
        return chunk if forecast and ended == chunk.ended and new == len(chunk.codes) else None

    def _captured(
        self, codec: CodecNetwork, new: int, frames: int, committed: int, ended: bool = False
    ) -> CapturedChunk:
        """Captures a chunk of `new` code frames after `frames` vocoder frames."""
        codes = torch.zeros(new, codec.config.dim, device=codec.device, dtype=torch.float32)
        state, lookahead = self.state, self._lookahead
        prior = codec.prior(default_lookahead(codec.config))

        def run() -> Tensor:
            state.frames, state.committed = frames, committed
            return decode_chunk(codec, state, codes, lookahead, prior, ended)

        return CapturedChunk(codes, ended, *self._capture(run))


class StreamGraphs:
    """A pool of states with their graphs, lent to the streams of one codec.

    Args:
        capture: makes a graph of a function; CUDA graphs by default.
    """

    def __init__(self, codec: CodecNetwork, capture: Capture | None = None) -> None:
        self._codec = weakref.ref(codec)
        self._capture = capture or CudaCapture()
        self._lock = threading.Lock()
        # Only append and pop, which are atomic: `give_back` may run in a garbage collection at any
        # point, where taking a lock could deadlock.
        self._idle: list[ChunkGraphs] = []
        self._kept = 1

    def serves(
        self, codec: CodecNetwork, lookahead: int, statistics: NormStatistics | Prior | None
    ) -> bool:
        """Whether a stream has the codec's own look-ahead, prior and layers (on the device).

        A copy of the codec may have other layers.
        """
        own = codec is self._codec() and lookahead == default_lookahead(codec.config)
        stacks = codec.decoder, codec.vocoder
        resident = all(isinstance(stack.layers, tuple) for stack in stacks)
        estimates = statistics is codec.prior(lookahead)
        return own and resident and estimates and streamable(codec.config)

    def warmup(self, streams: int, progress: bool = True) -> None:
        """Captures until `streams` states are idle, and keeps that many from then on."""
        codec = self._owner()
        lookahead = default_lookahead(codec.config)
        if not self.serves(codec, lookahead, codec.prior(lookahead)):
            return
        self._kept = max(self._kept, streams)
        # tqdm shows the bar only on a terminal.
        show = None if progress else True
        missing = range(len(self._idle), streams)
        for _ in tqdm(missing, desc="capturing", unit="stream", leave=False, disable=show):
            self._idle.append(self._captured())

    def take(self) -> ChunkGraphs:
        """A reset state from the pool, or a new one, captured now."""
        try:
            graphs = self._idle.pop()
        except IndexError:
            return self._captured()
        graphs.state.reset()
        return graphs

    def give_back(self, graphs: ChunkGraphs) -> None:
        if len(self._idle) < self._kept:
            self._idle.append(graphs)

    # A state outlives the stream it is captured for, and so that caller's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self) -> ChunkGraphs:
        return ChunkGraphs(self._owner(), self._capture, self._lock)

    def _owner(self) -> CodecNetwork:
        codec = self._codec()
        assert codec is not None
        return codec
