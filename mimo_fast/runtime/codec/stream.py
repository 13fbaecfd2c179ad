"""`CodecStream`: incremental decoding; the cost of a push depends on its own frames alone."""

import math
import weakref

import torch
from torch import Tensor

from mimo_fast.modes import in_own_modes
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, Lookahead, streamable
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.pools import CodecState
from mimo_fast.runtime.codec.prior import know
from mimo_fast.runtime.codec.schedule import Known, Schedule
from mimo_fast.runtime.codec.state import (
    ELASTIC_SETTLING,
    RESTART_LIMIT,
    SETTLING,
    NormStatistics,
    Rows,
)
from mimo_fast.runtime.codec.together import Push, advance, threads_of


class CodecStream:
    """One waveform in progress: feed codes with `push`, end with `finish`; parts join seamlessly.

    Streams of one codec share its weights and a pool of rows: each borrows one until it is closed
    or garbage-collected. Memory (`nbytes`) does not grow. Several streams with codes at the same
    time are decoded together by `Codec.advance`; a push is one of its own. Streams may be used in
    several threads, each stream in one at a time; their computations take turns.

    Args:
        codec: weights.
        lookahead: patches that must follow a sample before it is returned, 0 to 10. With fewer the
            first audio comes earlier, but differs more from one-shot decoding, because the vocoder
            then works without the frames that are missing. "elastic" begins with one and goes on to
            the vocoder's reach, see `elastic_rows`: for listeners. "exact" is `default_lookahead`.
        statistics: norm statistics, as `Codec.moments` measures them on other codes of the same
            speaker; by default they are estimated from the codes pushed.
        graphs: the graphs of the codec's chunks.
        weight: code frames that the statistics count for, as if they preceded the stream's own;
            `math.inf` uses them as they are.
        again: code frames up to which the stream is decoded again as it grows, so that its norm
            statistics are as good as upstream's; 0 for the least time a push, at most 256.
            Statistics that are used as they are need none of it.

    Raises:
        ValueError: an argument is out of range, or the codec's look-ahead is unlimited.
    """

    @in_own_modes
    def __init__(
        self,
        codec: CodecNetwork,
        lookahead: Lookahead = LOOKAHEAD,
        statistics: NormStatistics | None = None,
        graphs: StreamGraphs | None = None,
        weight: float = math.inf,
        again: int = 0,
    ) -> None:
        codec.owner.check()
        config = codec.config
        if not weight >= 0:
            raise ValueError(f"weight must be 0 code frames or more, not {weight}")
        if not 0 <= again <= RESTART_LIMIT:
            raise ValueError(
                f"again must be between 0 and {RESTART_LIMIT} code frames, not {again}"
            )
        known = Known.of(statistics is not None, weight)
        self.schedule = Schedule.of(config, lookahead, known)
        if not streamable(config):
            raise ValueError("this codec's layers see all of the audio to come: decode it at once")
        self.codec, self._graphs = codec, graphs
        self._totals: Tensor | None = None
        self._state: CodecState | None
        with codec.pools.lock, threads_of(codec):
            if graphs is not None and graphs.serves(codec, self.schedule):
                state = graphs.take(self.schedule)
            else:
                pool = codec.pools.of(config, self.schedule.lookahead, codec.dtype, codec.device)
                state = pool.take()
            self._give_back = weakref.finalize(self, state.pool.give_back, state)
            self._give_back.atexit = False
            settling = ELASTIC_SETTLING if self.schedule.elastic else SETTLING
            state.decode_again(again, settling)
            try:
                know(config, state, statistics, weight)
            except ValueError:
                self._give_back()
                raise
        self._state = state

    @property
    def device(self) -> torch.device:
        return self.codec.device

    @property
    def nbytes(self) -> int:
        """Bytes that the stream holds on the device."""
        return 0 if self._state is None else self._state.nbytes

    @property
    def totals(self) -> Tensor | None:
        """Sums of the rows of the last stream that was finished, see `prior.totals`.

        None if it had no codes, and before the first one.
        """
        return self._totals if self._state is None else self._state.totals

    @in_own_modes
    def push(self, codes: Tensor, trusted: bool = False) -> Tensor:
        """The next codes [n, t] -> samples that are final now, float32 [m]; m may be 0.

        trusted: skips the range check, for codes drawn by the model: it would make the host wait
            for the device.

        Raises:
            NumericError: on a CPU, samples are not finite; on a GPU they are NaN then.
        """
        return self._advanced(codes, False, trusted)

    @in_own_modes
    def finish(self, codes: Tensor | None = None, trusted: bool = False) -> Tensor:
        """The last codes, if any -> all samples still held back. The stream is then reset."""
        return self._advanced(codes, True, trusted)

    @in_own_modes
    def reset(self) -> None:
        """Drops what was pushed; the same memory serves the next waveform."""
        with self.codec.pools.lock, threads_of(self.codec):
            state = self.state()
            Rows.of([state.row], self.device).reset(state.tensors)
            state.begin()

    def close(self) -> None:
        """Gives the memory back; the stream cannot be used after it."""
        if self._state is not None:
            self._totals, self._state = self._state.totals, None
            self._give_back()

    def state(self) -> CodecState:
        """Its row of a pool, which moves unless the pool's lock is held.

        Raises:
            ValueError: the stream is closed.
        """
        self.codec.owner.check()
        if self._state is None:
            raise ValueError("the stream is closed: make another with codec.stream()")
        return self._state

    def _advanced(self, codes: Tensor | None, ended: bool, trusted: bool) -> Tensor:
        self.state()
        if codes is not None and not trusted:
            self.codec.check_codes(codes)
        (found,) = advance(self.codec, self._graphs, [Push(self, codes, ended)])
        if isinstance(found, Exception):
            raise found
        return found
