"""The state of one incremental decode: buffers of fixed size, allocated up front.

Positions and sums are tensors on the device and every buffer is updated in place, so that a
captured graph can replay a chunk of fixed size. Counters on the host only select views of results.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

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

MeanVariance = tuple[Tensor, Tensor]
"""Mean and variance, float32 scalars."""


class NormStatistics(NamedTuple):
    """Mean and variance of each norm over time; `unpool` is None where the codec does not pool."""

    unpool: MeanVariance | None
    to_mel: MeanVariance


class Prior(NamedTuple):
    """Sums of rows that count as if they preceded a norm's own, float64 [3] each; 0 for none.

    (rows, mean times rows, mean square times rows), as in `RunningStatistics.sums`.
    """

    unpool: Tensor
    to_mel: Tensor


@dataclass
class RunningStatistics:
    """Estimates the mean and variance of a norm over time at the end of the utterance.

    One-shot decoding norms by the statistics of the whole utterance, which a stream must estimate.
    Until `expected` rows have been added, the missing rows are extrapolated: they get the mean of
    the rows so far, weighted by position, because the first outputs of the causal decoder attend to
    few positions and differ from the rest. After that, and at the end, the estimate is the plain
    statistics of all rows, so that codes pushed at once are decoded as in one shot. docs/LOG.md has
    the figures.

    A stream that is decoded again extrapolates nothing: the forecast gains up to 3 dB where an
    utterance goes on for as long as it expects, and loses up to 11 dB where it soon ends.

    Args:
        sums: float64 [2, 3], sums over rows of (weight, weighted mean over channels, weighted mean
            square over channels); the weight is 1 in row 0 and the row's position in row 1.
        expected: rows up to which missing rows are extrapolated, int64 scalar, 0 for none. On the
            device, so that one graph serves streams with and without a forecast.
        frame_rows: rows of a code frame.
    """

    sums: Tensor
    expected: Tensor
    frame_rows: int

    @classmethod
    def allocate(cls, frame_rows: int, device: torch.device) -> RunningStatistics:
        """frame_rows: rows of a code frame."""
        sums = torch.zeros(2, 3, dtype=torch.float64, device=device)
        expected = torch.full((), FORECAST * frame_rows, dtype=torch.int64, device=device)
        return cls(sums, expected, frame_rows)

    def forecast(self, frames: int) -> None:
        """Extrapolates up to so many code frames from now on."""
        self.expected.fill_(frames * self.frame_rows)

    def add(self, moments: Tensor, first: Tensor) -> None:
        """Adds final rows, `row_moments` [R, 3], from position `first` on, but those before 0."""
        self.sums += _sums(moments, first)

    def with_rows(self, moments: Tensor, first: Tensor) -> Tensor:
        """Sums as if `add` had been called, which they leave unchanged."""
        return self.sums + _sums(moments, first)

    def estimate(self, sums: Tensor, ended: bool) -> MeanVariance:
        """Mean and variance at the end of an utterance that has these sums [2, 3] so far."""
        plain, later = sums
        missing = (self.expected - plain[0]).clamp(min=0) * (not ended)
        mean, square = (plain[1:] + missing * later[1:] / later[0]) / (plain[0] + missing)
        return mean.float(), (square - mean.square()).float()


def mean_variance(sums: Tensor) -> MeanVariance:
    """Mean and variance of rows that have these sums [3], see `RunningStatistics.sums`."""
    count, *totals = sums
    mean, square = (total / count for total in totals)
    return mean.float(), (square - mean.square()).float()


def row_moments(rows: Tensor) -> Tensor:
    """Rows [R, D] -> float64 [R, 3]: 1, and mean and mean square over channels."""
    wide = rows.double()
    moments = wide.new_ones(len(rows), 3)
    torch.mean(wide, dim=1, out=moments[:, 1])
    torch.mean(wide.square(), dim=1, out=moments[:, 2])
    return moments


def _sums(moments: Tensor, first: Tensor) -> Tensor:
    places = first + torch.arange(len(moments), device=moments.device, dtype=torch.int64)
    plain = (places >= 0).double()
    return torch.stack((plain, plain * (places + 0.5))) @ moments


@dataclass
class StackState:
    """Rotated keys and values that later positions of a stack see: [layers, H, S, Dh] each."""

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(
        cls, stack: tuple[int, int, int], size: int, dtype: torch.dtype, device: torch.device
    ) -> StackState:
        """stack: layers, heads, D; size: S."""
        layers, heads, width = stack
        shape = (layers, heads, size, width // heads)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))


@dataclass
class CodecState:
    """One waveform in progress; its newest P vocoder frames are pending and may still change.

    Args:
        position: number of decoder positions done, int64 scalar; slot p % S of `decoder` holds
            position p.
        entered: inputs of the decoder's layers for the pending frames, before the norm over time
            [P / stride, D].
        added: what the layers added to them, float32 [P / stride, D].
        history: normed outputs of the decoder before the pending ones, which the next convolution
            still reads.
        unpool, to_mel: statistics of the norms over time; those of `to_mel` are without the pending
            frames.
        decoder: keys and values of the decoder's layers, a ring buffer.
        frame: number of vocoder frames so far, int64 scalar.
        vocoder: keys and values of the vocoder frames before the pending ones.
        tail: sums of windowed frames and of squared windows that later frames add to
            [2, n_fft - hop].
        given: norm statistics that the stream was given, float32 [2, 2]: of `unpool` and `to_mel`,
            mean and variance of each.
        prior: sums of earlier rows that count as this stream's, float64 [2, 3], see `Prior`.
        committed: number of vocoder frames that are in the waveform, on the host.
        frames: number of vocoder frames so far, on the host.
        held: dequantized codes held back until the first samples can be final.
        past: all dequantized codes of a short stream, to decode it again from the start.
        largest: code frames of the largest push.
        again: code frames up to which the stream is decoded again as it grows; 0 for none.
        decoded: code frames when it was last decoded from the start.
    """

    position: Tensor
    entered: Tensor
    added: Tensor
    history: Tensor
    unpool: RunningStatistics
    decoder: StackState
    to_mel: RunningStatistics
    frame: Tensor
    vocoder: StackState
    tail: Tensor
    given: Tensor
    prior: Tensor
    committed: int = 0
    frames: int = 0
    held: list[Tensor] = field(default_factory=list)
    past: list[Tensor] = field(default_factory=list)
    largest: int = 0
    again: int = 0
    decoded: int = 0

    @classmethod
    def allocate(
        cls, config: CodecConfig, pending: int, dtype: torch.dtype, device: torch.device
    ) -> CodecState:
        """pending: P, a multiple of the decoder's stride."""
        context = decoder_context(config.decoder_window)
        stride = config.decoder_stride
        positions = pending // stride
        decoder = config.decoder_layers, config.decoder_heads, config.dim
        vocoder = config.vocoder_layers, config.vocoder_heads, config.vocoder_dim
        history = -(-conv_overlap(config.decoder_kernel, stride) // stride)
        return cls(
            position=torch.zeros((), dtype=torch.int64, device=device),
            entered=torch.zeros(positions, config.dim, dtype=dtype, device=device),
            added=torch.zeros(positions, config.dim, device=device, dtype=torch.float32),
            history=torch.zeros(history, config.dim, dtype=dtype, device=device),
            unpool=RunningStatistics.allocate(config.pool, device),
            decoder=StackState.allocate(decoder, context + BLOCK, dtype, device),
            to_mel=RunningStatistics.allocate(config.pool * config.decoder_stride, device),
            frame=torch.zeros((), dtype=torch.int64, device=device),
            vocoder=StackState.allocate(vocoder, config.vocoder_window[0], dtype, device),
            tail=torch.zeros(2, config.n_fft - config.hop, device=device, dtype=torch.float32),
            given=torch.zeros(2, 2, device=device, dtype=torch.float32),
            prior=torch.zeros(2, 3, device=device, dtype=torch.float64),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in [*_tensors(self), *self.held, *self.past])

    @property
    def trim(self) -> int:
        """Samples of the first window before the waveform, and of the last window after it."""
        return self.tail.shape[1] // 2

    def reset(self) -> None:
        """Resets the state to the start of a waveform, in the same memory."""
        self.rewind()
        self.tail.zero_()
        self.committed = self.largest = self.decoded = 0
        self.held.clear()
        self.past.clear()

    def rewind(self) -> None:
        """Resets all but the waveform so far, to decode the codes again from the first."""
        forecasts = self.unpool.expected, self.to_mel.expected
        kept = self.tail, self.given, self.prior, *forecasts
        for tensor in _tensors(self):
            if all(tensor is not each for each in kept):
                tensor.zero_()
        self.frames = 0

    def decode_again(self, frames: int) -> None:
        """Sets, before the first codes, up to how many code frames are decoded again; 0 for none.

        It replaces the forecast.
        """
        self.again = frames
        for norm in (self.unpool, self.to_mel):
            norm.forecast(0 if frames else FORECAST)


def new_state(
    config: CodecConfig, lookahead: int, dtype: torch.dtype, device: torch.device
) -> CodecState:
    """The state of a stream with `lookahead` patches of look-ahead."""
    stride = config.decoder_stride
    reach = -(-config.vocoder_layers * config.vocoder_window[1] // stride) * stride
    return CodecState.allocate(config, max(reach, lookahead * patch_rows(config)), dtype, device)


def decoder_context(window: tuple[int, int]) -> int:
    """Positions before its own that a position sees: the window's left side, at most CONTEXT."""
    return min(window[0], CONTEXT) if window[0] >= 0 else CONTEXT


def _tensors(state: object) -> list[Tensor]:
    found: list[Tensor] = []
    for each in fields(state):  # type: ignore[arg-type]
        value = getattr(state, each.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, RunningStatistics | StackState):
            found += _tensors(value)
    return found
