"""`CodecStream`: incremental decoding; the cost of a push depends on its own frames alone."""

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mimo_fast.kernels.cpu.library import one_thread
from mimo_fast.modes import in_own_modes
from mimo_fast.runtime.codec.finite import checked_samples
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, Lookahead, streamable
from mimo_fast.runtime.codec.graphs import LentState, StreamGraphs
from mimo_fast.runtime.codec.incremental import codes_to_decode, decode_chunk
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.prior import PRIOR_FRAMES, know, totals
from mimo_fast.runtime.codec.schedule import Schedule
from mimo_fast.runtime.codec.state import CodecState, NormStatistics, new_state


class CodecStream:
    """One waveform in progress: feed codes with `push`, end with `finish`; parts join seamlessly.

    Streams of one codec share only its weights. Memory (`nbytes`) does not grow. With CUDA graphs a
    stream borrows a state from their pool until it is closed or garbage-collected.

    Args:
        codec: weights.
        lookahead: patches that must follow a sample before it is returned, 0 to 10. With fewer the
            first audio comes earlier, but differs more from one-shot decoding, because the vocoder
            then works without the frames that are missing. "elastic" begins with one and goes on to
            the vocoder's reach, see `elastic_rows`: for listeners. "exact" is `default_lookahead`.
        statistics: norm statistics, as `Codec.moments` measures them on other codes of the same
            speaker; by default they are estimated from the codes pushed. An elastic stream takes
            them for those of `weight` code frames that precede its own.
        graphs: the pool of captured states.
        weight: 0 or more; `math.inf` uses the statistics as they are, as other streams do.

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
        weight: float = PRIOR_FRAMES,
    ) -> None:
        codec.owner.check()
        config = codec.config
        self._schedule = schedule = Schedule.of(config, lookahead, statistics is not None)
        if not weight >= 0:
            raise ValueError(f"weight must be 0 code frames or more, not {weight}")
        if not streamable(config):
            raise ValueError("this codec's layers see all of the audio to come: decode it at once")
        self._codec = codec
        self._totals: Tensor | None = None
        self._graphs: LentState | None = None
        self._state: CodecState | None
        with self._threads():
            if graphs is not None and graphs.serves(codec, schedule):
                self._graphs = graphs.take(schedule)
                self._state = self._graphs.state
                self._give_back = weakref.finalize(self, graphs.give_back, self._graphs)
                self._give_back.atexit = False
            else:
                self._state = new_state(config, schedule.lookahead, codec.dtype, codec.device)
            know(codec.config, self._state, statistics, weight)
        self._statistics = schedule.statistics(config, self._state)

    @property
    def nbytes(self) -> int:
        """Bytes that the stream holds on the device."""
        return 0 if self._state is None else self._state.nbytes

    @property
    def totals(self) -> Tensor | None:
        """Sums of the rows of the last stream that was finished, see `prior.totals`.

        None if it had no codes, and before the first one.
        """
        return self._totals

    @in_own_modes
    def push(self, codes: Tensor, trusted: bool = False) -> Tensor:
        """The next codes [n, t] -> samples that are final now, float32 [m]; m may be 0.

        trusted: skips the range check, for codes drawn by the model: it would make the host wait
            for the device.

        Raises:
            NumericError: on a CPU, samples are not finite; on a GPU they are NaN then.
        """
        return self._advance(codes, False, trusted)

    @in_own_modes
    def finish(self, codes: Tensor | None = None, trusted: bool = False) -> Tensor:
        """The last codes, if any -> all samples still held back. The stream is then reset."""
        wav = self._advance(codes, True, trusted)
        state = self._open()
        self._totals = totals(state) if state.frames else None
        self.reset()
        return wav

    def reset(self) -> None:
        """Drops what was pushed; the same memory serves the next waveform."""
        with self._threads():
            self._open().reset()

    def close(self) -> None:
        """Gives the memory back; the stream cannot be used after it."""
        if self._graphs is not None:
            self._give_back()
        self._state = self._graphs = self._statistics = None

    def _threads(self) -> AbstractContextManager[None]:
        return one_thread() if self._codec.decoder.fused else nullcontext()

    def _open(self) -> CodecState:
        self._codec.owner.check()
        if self._state is None:
            raise ValueError("the stream is closed: make another with codec.stream()")
        return self._state

    def _advance(self, codes: Tensor | None, ended: bool, trusted: bool) -> Tensor:
        with self._threads():
            wav = self._decoded(codes, ended, trusted)
        return checked_samples(self._codec, wav, codes)

    def _decoded(self, codes: Tensor | None, ended: bool, trusted: bool) -> Tensor:
        state, codec = self._open(), self._codec
        if codes is not None:
            if not trusted:
                codec.check_codes(codes)
            state.held.append(codec.dequantize(codes))
            state.largest = max(state.largest, codes.shape[1])
        waiting = sum(map(len, state.held))
        # Codes are held back until the first sample can be final: decoding them earlier would not
        # return audio sooner, and waiting gives the norm statistics more rows.
        too_few = waiting == 0 or (waiting <= self._schedule.hold and not ended)
        if state.frames == 0 and too_few:
            return torch.zeros(0, dtype=torch.float32, device=codec.device)
        hidden = torch.cat([*state.held, codec.codebooks.books[0].new_zeros(0, codec.config.dim)])
        state.held.clear()
        if self._statistics is None:
            hidden = codes_to_decode(state, hidden)
        wav = None if self._graphs is None else self._graphs.advance(hidden, ended)
        if wav is not None:
            return wav
        config = codec.config
        frames = state.frames + len(hidden) * config.pool * config.decoder_stride
        lookahead = self._schedule.rows(config, frames)
        return decode_chunk(codec, state, hidden, lookahead, self._statistics, ended)
