"""CUDA graphs of codec streams that are fed patch by patch.

Four kinds of chunks have shapes that come again and again:

    first  the first decode: the codes held back for the look-ahead, and one patch more
    ramp   one patch while an elastic stream holds back more and more: half a patch becomes final
    next   one patch in steady state: each patch makes as many frames final as it adds
    last   no codes; makes all pending frames final, in steady state

Each is captured once per number of streams 1, 2, 4, ..., the rows of a pool, and replayed for any
rows of it: their numbers, and all that differs between streams, are in device memory. A batch
between two sizes is padded with the pool's scratch row. What streams know of their norms differs
by row too, so one graph serves exact and elastic streams, with statistics of any source. Any other
chunk (pushes of another size, the end of a stream in its ramp, a short stream that is decoded again
from its start) runs kernel by kernel in the same rows, before, between or after the graphs.

Rows of a pool with graphs stay where they are. Without `warmup` streams find a pool of one row, the
next ones further pools, each as large as those before together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.config import CodecConfig
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, patch_rows, streamable
from mimo_fast.runtime.codec.incremental import RowNumbers, Shape, decode_rows
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.persistent import persistent
from mimo_fast.runtime.codec.pools import CodecPool, CodecState
from mimo_fast.runtime.codec.schedule import Known, Schedule, usual_schedules
from mimo_fast.runtime.codec.state import Rows, integers
from mimo_fast.runtime.lm.graphs import Capture, CudaCapture


def usual_shapes(config: CodecConfig, lookahead: int) -> list[Shape]:
    """Shapes of chunks of streams that hold back so many patches in the end, fed by patches."""
    patch = patch_rows(config)
    most = lookahead * patch
    # After so many committed frames, no chunk trims samples at the start of the waveform.
    begun = -(-((config.n_fft - config.hop) // 2) // config.hop)
    found = list[Shape]()
    for schedule in usual_schedules(config):
        if schedule.lookahead != lookahead:
            continue

        def shape(
            before: tuple[int, int], codes: int, ended: bool = False, schedule: Schedule = schedule
        ) -> Shape:
            return Shape.of(config, schedule, before, codes, anew=False, ended=ended)

        found.append(shape((0, 0), schedule.hold + PATCH_FRAMES))
        # Twice as many frames as are held back end a ramp.
        steady = begun + 2 * most, begun + most
        found += [shape(steady, PATCH_FRAMES), shape(steady, 0, ended=True)]
        if schedule.elastic and most > patch >= begun:
            found.append(shape((2 * patch, patch), PATCH_FRAMES))
    return [*dict.fromkeys(found)]


@dataclass(frozen=True)
class CapturedRows:
    """One graph of N streams.

    Attributes:
        codes: Its input, dequantized codes [N, T, D] float32.
        table: Rows and `RowNumbers` int64 [4, N].
        result: Samples [N, m].
    """

    codes: Tensor
    table: Tensor
    replay: Callable[[], None]
    result: Tensor


class RowGraphs:
    """The graphs of one pool.

    Args:
        buckets: numbers of streams that are captured, rising.
    """

    def __init__(
        self, codec: CodecNetwork, pool: CodecPool, capture: Capture, buckets: Sequence[int]
    ) -> None:
        self.pool, self.buckets, self._capture = pool, buckets, capture
        self.shapes = usual_shapes(codec.config, pool.lookahead)
        self._captured: dict[tuple[Shape, int, bool], CapturedRows] = {}

    def warmup(self, codec: CodecNetwork, done: Callable[[], object]) -> None:
        """Captures all of them, the largest first, so that others reuse its memory."""
        for bucket in reversed(self.buckets):
            for shape in self.shapes:
                self._graph(codec, shape, bucket)
                done()

    def run(
        self,
        codec: CodecNetwork,
        shape: Shape,
        numbers: Sequence[tuple[int, int, int, int]],
        hidden: Sequence[Tensor],
    ) -> Tensor:
        """`decode_rows` of at most as many chunks as the largest bucket, samples copied [N, m].

        Args:
            numbers: row and `RowNumbers` of each.
            hidden: dequantized codes [T, D] of each.
        """
        count = len(numbers)
        graph = self._graph(codec, shape, next(size for size in self.buckets if size >= count))
        padding = [(self.pool.scratch, *numbers[0][1:])] * (len(graph.codes) - count)
        graph.table.copy_(integers([*zip(*numbers, *padding, strict=True)], codec.device))
        torch.stack([*hidden], out=graph.codes[:count])
        graph.replay()
        return graph.result[:count].clone()

    # A graph outlives the stream it is captured for, and so that caller's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _graph(self, codec: CodecNetwork, shape: Shape, bucket: int) -> CapturedRows:
        launched = persistent(codec)
        # Graphs that launch what has given up are not replayed.
        form = shape, bucket, launched is not None and launched.error.on
        if form not in self._captured:
            size = bucket, shape.codes, codec.config.dim
            codes = torch.zeros(size, dtype=torch.float32, device=codec.device)
            # A capture runs on the scratch row, as if it held as much as becomes final.
            new = shape.skipped + sum(block.new for block in shape.blocks)
            held = max(0, shape.decided - new)
            column = self.pool.scratch, held, Known.NOTHING, 0
            table = integers([[each] * bucket for each in column], codec.device)
            rows, state = Rows(table[0]), self.pool.tensors

            def run() -> Tensor:
                return decode_rows(codec, state, rows, codes, RowNumbers(table[1:]), shape)

            self._captured[form] = CapturedRows(codes, table, *self._capture(run))
        return self._captured[form]


class StreamGraphs:
    """Pools of rows with their graphs, lent to the streams of one codec.

    Their results share memory, so one is valid at once, under the lock of the codec's pools; all
    run on one CUDA stream.

    Args:
        capture: makes a graph of a function; CUDA graphs by default.
        together: whether graphs take several streams; by default as `NewPath.CODEC_ROWS` is
            enabled.
    """

    def __init__(
        self, codec: CodecNetwork, capture: Capture | None = None, together: bool | None = None
    ) -> None:
        self._codec = weakref.ref(codec)
        self._capture = capture or CudaCapture()
        default = enabled(NewPath.CODEC_ROWS, codec.device)
        self._together = default if together is None else together
        schedules = usual_schedules(codec.config)
        self._graphs = {schedule.lookahead: list[RowGraphs]() for schedule in schedules}
        self._kept = 1

    def serves(self, codec: CodecNetwork, schedule: Schedule) -> bool:
        """Whether a stream has a usual schedule, and the codec its own layers, on the device.

        A copy of the codec may have other layers.
        """
        stacks = codec.decoder, codec.vocoder
        resident = all(isinstance(stack.layers, tuple) for stack in stacks)
        own = codec is self._codec() and resident and streamable(codec.config)
        return own and schedule in usual_schedules(codec.config)

    def of(self, pool: CodecPool, shape: Shape) -> RowGraphs | None:
        """The graphs that take a chunk of a stream in this pool, if any do."""
        known = self._graphs.get(pool.lookahead, [])
        graphs = next((each for each in known if each.pool is pool), None)
        return graphs if graphs is not None and shape in graphs.shapes else None

    def warmup(self, streams: int, progress: bool = True) -> None:
        """Makes pools of `streams` rows, keeps them from now on, and captures their graphs."""
        codec = self._owner()
        exact, _, elastic = usual_schedules(codec.config)
        if not self.serves(codec, exact):
            return
        with codec.pools.lock:
            self._kept = max(self._kept, streams)
            needed = [
                self._first(patches)
                for patches in dict.fromkeys((exact.lookahead, elastic.lookahead))
            ]
            total = sum(len(each.buckets) * len(each.shapes) for each in needed)
            # tqdm shows the bar only on a terminal.
            show = None if progress else True
            with tqdm(
                total=total, desc="capturing", unit="graph", leave=False, disable=show
            ) as bar:
                for each in needed:
                    each.warmup(codec, bar.update)

    def take(self, schedule: Schedule) -> CodecState:
        """A row for a stream that `serves` takes; the lock is held."""
        self._first(schedule.lookahead)
        self._graphs[schedule.lookahead] = known = [
            each
            for i, each in enumerate(self._graphs[schedule.lookahead])
            if i == 0 or each.pool.used
        ]
        graphs = next((each for each in known if each.pool.used < each.pool.capacity), None)
        if graphs is None:
            graphs = self._made(schedule.lookahead, sum(each.pool.capacity for each in known))
            known.append(graphs)
        return graphs.pool.take()

    def _first(self, lookahead: int) -> RowGraphs:
        """The graphs of the pool that is kept."""
        known = self._graphs[lookahead]
        if not known or known[0].pool.capacity < self._kept:
            known.insert(0, self._made(lookahead, self._kept))
        return known[0]

    def _made(self, lookahead: int, rows: int) -> RowGraphs:
        codec = self._owner()
        form = codec.config, lookahead, codec.dtype, codec.device
        pool = CodecPool(*form, codec.pools.lock, fixed=rows)
        powers = [1 << i for i in range((rows - 1).bit_length())] if self._together else []
        buckets = [*powers, rows if self._together else 1]
        return RowGraphs(codec, pool, self._capture, buckets)

    def _owner(self) -> CodecNetwork:
        codec = self._codec()
        assert codec is not None
        return codec
