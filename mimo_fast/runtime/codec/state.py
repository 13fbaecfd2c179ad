"""All that changes while one waveform is decoded as its codes come: buffers of fixed size,
allocated up front.

Positions and sums are tensors on the device and every buffer is updated in place, so that a
captured graph may replay a chunk of fixed size. What the host counts only picks views of results.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.runtime.codec.geometry import conv_overlap, patch_rows

CONTEXT = 512
"""Decoder positions before its own that a position sees at least: 256 code frames, 10.24 s
(upstream: 250 frames)."""

BLOCK = 64
"""Decoder positions computed at once at most; longer pushes go block by block."""

FORECAST = 200
"""Code frames that an utterance is expected to last at least: 8 s."""

WHOLE_UTTERANCE = 150
"""Code frames of a push that is taken to hold most of an utterance: no forecast after it."""

RESTART_LIMIT = CONTEXT // 2
"""Code frames up to which a stream may begin anew: a decoder position still sees all of them."""

MeanVariance = tuple[Tensor, Tensor]
"""Mean and variance, scalars."""


class NormStatistics(NamedTuple):
    """Mean and variance of each norm over time; `unpool` is None where the codec does not pool."""

    unpool: MeanVariance | None
    to_mel: MeanVariance


@dataclass
class RunningStatistics:
    """Estimates mean and variance that a norm over time will have seen by the end.

    One-shot decoding norms by the statistics of a whole utterance, which a stream must guess while
    it lasts. Until `expected` rows have come, those that are missing are taken to have the
    statistics of those that came, later ones counting more, in proportion to their position: the
    causal decoder's first outputs, which attend to few others, differ from the rest. After that,
    and at the end, it is the plain statistics of all that came, so that what is pushed at once is
    decoded as in one shot. docs/LOG.md has the figures.

    Args:
        sums: float64 [2, 3]: sums over rows of weight, weighted mean and weighted mean square over
            channels, with weight 1 and with the row's position as weight.
    """

    sums: Tensor
    expected: int

    @classmethod
    def allocate(cls, frame_rows: int, device: torch.device) -> RunningStatistics:
        """frame_rows: rows of a code frame."""
        return cls(torch.zeros(2, 3, dtype=torch.float64, device=device), FORECAST * frame_rows)

    def add(self, rows: Tensor, first: Tensor) -> None:
        """Adds final rows [R, D], the first at position `first`; those before 0 are left out."""
        self.sums += _sums(rows, first)

    def estimate(self, rows: Tensor, first: Tensor, ended: bool) -> MeanVariance:
        """Mean and variance over what was added and these rows, from position `first` on."""
        plain, later = self.sums + _sums(rows, first)
        missing = (self.expected - plain[0]).clamp(min=0) * (not ended)
        mean, square = (plain[1:] + missing * later[1:] / later[0]) / (plain[0] + missing)
        return mean.float(), (square - mean.square()).float()


def _sums(rows: Tensor, first: Tensor) -> Tensor:
    places = first + torch.arange(len(rows), device=rows.device)
    plain = (places >= 0).double()
    wide = rows.double()
    values = torch.stack((torch.ones_like(plain), wide.mean(1), wide.square().mean(1)), dim=1)
    return torch.stack((plain, plain * (places + 0.5))) @ values


@dataclass
class StackState:
    """Rotated keys, and values, that later positions of a stack see: [layers, H, S, Dh] each."""

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(
        cls,
        layers: int,
        heads: int,
        width: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StackState:
        shape = (layers, heads, size, width // heads)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))


@dataclass
class CodecState:
    """One waveform in progress; its newest P vocoder frames are pending and may still change.

    Args:
        position: decoder positions done, int64 scalar; slot p % S of `decoder` holds position p.
        entered: what the decoder's layers were given [P / stride, D] for the pending frames, before
            the norm over time.
        added: what the layers added to it, float32 [P / stride, D].
        history: normed outputs of the decoder before those, which the next convolution still
            reaches.
        unpool, to_mel: statistics of the norms over time; those of `to_mel` leave the pending
            frames out.
        frame: vocoder frames that have come, int64 scalar. vocoder: keys and values of those before
            the pending ones.
        tail: [2, n_fft - hop], sums of windowed frames and of squared windows that later frames add
            to.
        committed: vocoder frames that are in the waveform. frames: those that have come, as the
            host counts them.
        held: dequantized codes that wait until a sample can come out of them.
        past: dequantized codes of a young stream. largest: code frames of its largest push.
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
    committed: int = 0
    frames: int = 0
    held: list[Tensor] = field(default_factory=list)
    past: list[Tensor] = field(default_factory=list)
    largest: int = 0

    @classmethod
    def allocate(
        cls, config: CodecConfig, pending: int, dtype: torch.dtype, device: torch.device
    ) -> CodecState:
        """pending: P, a multiple of the decoder's stride."""
        positions, context = (
            pending // config.decoder_stride,
            decoder_context(config.decoder_window),
        )
        history = -(
            -conv_overlap(config.decoder_kernel, config.decoder_stride) // config.decoder_stride
        )
        return cls(
            position=torch.zeros((), dtype=torch.int64, device=device),
            entered=torch.zeros(positions, config.dim, dtype=dtype, device=device),
            added=torch.zeros(positions, config.dim, device=device),
            history=torch.zeros(history, config.dim, dtype=dtype, device=device),
            unpool=RunningStatistics.allocate(config.pool, device),
            decoder=StackState.allocate(
                config.decoder_layers,
                config.decoder_heads,
                config.dim,
                context + BLOCK,
                dtype,
                device,
            ),
            to_mel=RunningStatistics.allocate(config.pool * config.decoder_stride, device),
            frame=torch.zeros((), dtype=torch.int64, device=device),
            vocoder=StackState.allocate(
                config.vocoder_layers,
                config.vocoder_heads,
                config.vocoder_dim,
                config.vocoder_window[0],
                dtype,
                device,
            ),
            tail=torch.zeros(2, config.n_fft - config.hop, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in [*_tensors(self), *self.held, *self.past]
        )

    @property
    def trim(self) -> int:
        """Samples of the first window before the waveform, and of the last window after it."""
        return self.tail.shape[1] // 2

    def reset(self) -> None:
        """Back to the beginning, in the same memory."""
        self.rewind()
        self.tail.zero_()
        self.committed = self.largest = 0
        self.held.clear()
        self.past.clear()

    def rewind(self) -> None:
        """Forgets all but the waveform so far: codes may be decoded again from the first."""
        for tensor in _tensors(self):
            if tensor is not self.tail:
                tensor.zero_()
        self.frames = 0


def new_state(
    config: CodecConfig, lookahead: int, dtype: torch.dtype, device: torch.device
) -> CodecState:
    """What a stream with a lookahead of so many patches needs on the device."""
    stride = config.decoder_stride
    reach = -(-config.vocoder_layers * config.vocoder_window[1] // stride) * stride
    return CodecState.allocate(config, max(reach, lookahead * patch_rows(config)), dtype, device)


def decoder_context(window: tuple[int, int]) -> int:
    """Positions before its own that a position sees: the window's left side, CONTEXT at most."""
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
