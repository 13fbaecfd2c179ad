"""CUDA graphs of a codec stream that is fed patch by patch. Of three kinds of chunks every shape
follows from the kind:

    opening  the first decode: the codes that waited for it and a patch more
    next     a patch, once the waveform's start is past and each patch decides as much as it brings
    last     no codes, what is still pending: nothing follows

Each is captured once per `CodecState` and replayed with nothing but that state and its input
changing, both in device memory. Any other chunk (pushes of another size, a young stream that begins
anew) is decoded one kernel at a time in the same buffers, before, between or after these.

States stay with the codec, which lends them to its streams: capturing takes as long as a few
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

from mimo_fast.runtime.codec.geometry import (
    PATCH_FRAMES,
    default_lookahead,
    patch_rows,
    streamable,
)
from mimo_fast.runtime.codec.incremental import decode_chunk
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.state import WHOLE_UTTERANCE, NormStatistics, new_state
from mimo_fast.runtime.lm.graphs import Capture, CudaCapture


@dataclass(frozen=True)
class CapturedChunk:
    """One graph: its input, dequantized codes [T, D] float32, and its result, samples [m].

    ended: whether its codes are the last of a stream.
    """

    codes: Tensor
    ended: bool
    replay: Callable[[], None]
    result: Tensor


class ChunkGraphs:
    """The state of one stream and its captured chunks, with the codec's own look-ahead and statistics.

    Args:
        lock: of the codec. Graphs share a pool of memory, so a result lies there only until another
            graph runs; all run on one CUDA stream.
    """

    def __init__(self, codec: CodecNetwork, capture: Capture, lock: threading.Lock) -> None:
        config, patches = codec.config, default_lookahead(codec.config)
        self.state = new_state(config, patches, codec.dtype, codec.device)
        self._capture, self._lock = capture, lock
        self._rate, self._lookahead = (
            config.pool * config.decoder_stride,
            patches * patch_rows(config),
        )
        # From so many committed frames on, nothing of the waveform's start is trimmed.
        self._begun = -(-self.state.trim // config.hop)
        steady = self._begun + self._lookahead
        self._first = self._captured(codec, (patches + 1) * PATCH_FRAMES, frames=0, committed=0)
        self._next = self._captured(codec, PATCH_FRAMES, steady, self._begun)
        self._last = self._captured(codec, 0, steady, self._begun, ended=True)
        self.state.reset()

    def advance(self, hidden: Tensor, ended: bool) -> Tensor | None:
        """`decode_chunk` of this state, samples copied; None for a kind that is not captured."""
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
        """The graph for so many code frames now."""
        state = self.state
        if state.frames == state.committed == 0:
            chunk = self._first
        elif state.committed >= self._begun and state.frames - state.committed == self._lookahead:
            chunk = self._last if ended else self._next
        else:
            return None
        # After a push that held most of an utterance the norms over time make no forecast.
        forecast = ended or state.largest < WHOLE_UTTERANCE
        return chunk if forecast and ended == chunk.ended and new == len(chunk.codes) else None

    def _captured(
        self, codec: CodecNetwork, new: int, frames: int, committed: int, ended: bool = False
    ) -> CapturedChunk:
        """The chunk of `new` code frames after so many vocoder frames, whatever the state holds."""
        codes, state, lookahead = (
            torch.zeros(new, codec.config.dim, device=codec.device),
            self.state,
            self._lookahead,
        )

        def run() -> Tensor:
            state.frames, state.committed = frames, committed
            return decode_chunk(codec, state, codes, lookahead, codec.stated_statistics, ended)

        return CapturedChunk(codes, ended, *self._capture(run))


class StreamGraphs:
    """States with their graphs, lent to the streams of one codec and kept for the next ones.

    Args:
        capture: how work becomes a graph; CUDA's by default.
    """

    def __init__(self, codec: CodecNetwork, capture: Capture | None = None) -> None:
        self._codec = weakref.ref(codec)
        self._capture = capture or CudaCapture()
        self._lock = threading.Lock()
        # Only appended to and popped from, which needs no lock: a garbage collection may give back
        # at any point.
        self._idle: list[ChunkGraphs] = []
        self._kept = 1

    def serves(
        self, codec: CodecNetwork, lookahead: int, statistics: NormStatistics | None
    ) -> bool:
        """Whether a stream is as the graphs were captured: look-ahead and statistics are the codec's,
        and so are its layers, which a copy may have changed, on the device."""
        own = codec is self._codec() and lookahead == default_lookahead(codec.config)
        resident = isinstance(codec.decoder.layers, tuple) and isinstance(
            codec.vocoder.layers, tuple
        )
        return (
            own and resident and statistics is codec.stated_statistics and streamable(codec.config)
        )

    def warmup(self, streams: int, progress: bool = True) -> None:
        """Captures until so many states wait for a stream, and keeps as many from then on."""
        codec = self._owner()
        if not self.serves(codec, default_lookahead(codec.config), codec.stated_statistics):
            return
        self._kept = max(self._kept, streams)
        # On a terminal only.
        show = None if progress else True
        missing = range(len(self._idle), streams)
        for _ in tqdm(missing, desc="capturing", unit="stream", leave=False, disable=show):
            self._idle.append(self._captured())

    def take(self) -> ChunkGraphs:
        """A state at its beginning; captured now if none waits."""
        try:
            graphs = self._idle.pop()
        except IndexError:
            return self._captured()
        graphs.state.reset()
        return graphs

    def give_back(self, graphs: ChunkGraphs) -> None:
        if len(self._idle) < self._kept:
            self._idle.append(graphs)

    # A state outlives the stream it was made for, and so the mode that this was made in.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self) -> ChunkGraphs:
        return ChunkGraphs(self._owner(), self._capture, self._lock)

    def _owner(self) -> CodecNetwork:
        codec = self._codec()
        assert codec is not None
        return codec
