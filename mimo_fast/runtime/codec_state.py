"""All that changes while one waveform is decoded as its codes come: buffers of fixed size, allocated up front.

Positions and sums are tensors on the device and every buffer is updated in place, so that a captured graph may replay a
chunk of fixed size. What the host counts only picks views of results.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .codec import Codec
    from .codec_layers import CodecStack, TransposedConv

CONTEXT = 512
"""Decoder positions before its own that a position sees at least: 256 code frames, 10.24 s (upstream: 250 frames)."""

BLOCK = 64
"""Decoder positions computed at once at most; longer pushes go block by block."""

FORECAST = 250
"""Code frames that an utterance is expected to last at least: 10 s, upstream's streaming context."""

NormMoments = tuple[Tensor, Tensor]
"""Mean and variance, scalars."""


class Moments(NamedTuple):
    """Mean and variance that each norm over time uses; `unpool` is None where the codec does not pool."""

    unpool: NormMoments | None
    to_mel: NormMoments


@dataclass
class ConvState:
    """Inputs that reach into the next outputs, and what the norm has seen of the outputs.

    One-shot decoding norms by the mean and variance of a whole utterance, which a stream must guess while it lasts.
    Until FORECAST frames have come, it expects those that are still missing to have the statistics of those that came,
    later ones counting more, in proportion to their position: the causal decoder's first outputs, which attend to few
    others, differ from the rest. After that, and at the end of the utterance, the norm uses the plain statistics of all
    that has come, so that what is pushed at once is decoded as in one shot. docs/LOG.md has the figures.

    Args:
        history: the last inputs [h, D_in], zeros before the first.
        rows: output rows seen, float64 scalar.
        sums: float64 [2, 3]: sums over rows of weight, weighted mean and weighted mean square over channels, with
            weight 1 and with the row's position as weight.
    """

    history: Tensor
    rows: Tensor
    sums: Tensor
    expected: int

    @classmethod
    def allocate(cls, conv: TransposedConv, frame_rows: int, dtype: torch.dtype) -> ConvState:
        """frame_rows: output rows of a code frame."""
        device = conv.weight.device
        rows, sums = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), (2, 3)))
        history = torch.zeros(-(-conv.overlap // conv.stride), conv.weight.shape[0], dtype=dtype, device=device)
        return cls(history, rows, sums, FORECAST * frame_rows)

    def extend(self, conv: TransposedConv, x: Tensor) -> Tensor:
        """Inputs x [T, D_in] that come next -> their output rows [T stride, D_out], which are counted in."""
        inputs = torch.cat((self.history, x))
        out = conv.convolve(inputs)[len(self.history) * conv.stride :][: len(x) * conv.stride]
        self.history.copy_(inputs[len(x) :])
        self.sums += self._sums_of(out, self.rows)
        self.rows += len(out)
        return out

    def moments(self, conv: TransposedConv, ended: bool) -> NormMoments:
        """Mean and variance to norm by now; as in one shot they count the rows begun by the last inputs."""
        sums = self.sums
        if conv.overlap:
            sums = sums + self._sums_of(conv.convolve(self.history)[-conv.overlap :], self.rows)
        plain, later = sums
        missing = (self.expected - plain[0]).clamp(min=0) * (not ended)
        mean, square = (plain[1:] + missing * later[1:] / later[0]) / (plain[0] + missing)
        return mean.float(), (square - mean.square()).float()

    def _sums_of(self, out: Tensor, before: Tensor) -> Tensor:
        places = before + torch.arange(len(out), device=out.device) + 0.5
        wide = out.double()
        values = torch.stack((torch.ones_like(places), wide.mean(1), wide.square().mean(1)), dim=1)
        return torch.stack((torch.ones_like(places), places)) @ values


@dataclass
class StackState:
    """Keys, already turned, and values that later positions of a stack see: [layers, H, S, Dh] each."""

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(cls, stack: CodecStack, layers: int, width: int, size: int, like: Tensor) -> StackState:
        shape = (layers, stack.heads, size, width // stack.heads)
        return cls(like.new_zeros(shape), like.new_zeros(shape))


@dataclass
class CodecState:
    """One waveform in progress.

    Args:
        position: decoder positions done, int64 scalar; slot p % S of `decoder` holds position p.
        frame: vocoder frames that have come, int64 scalar.
        mel: convolution output [P, n_mels] of the newest P frames: those that the vocoder may still change.
        vocoder: keys and values of the frames before those.
        tail: [2, n_fft - hop], sums of windowed frames and of squared windows that later frames add to.
        committed: vocoder frames that are in the waveform. frames: those that have come, as the host counts them.
    """

    unpool: ConvState | None
    position: Tensor
    decoder: StackState
    to_mel: ConvState
    frame: Tensor
    mel: Tensor
    vocoder: StackState
    tail: Tensor
    committed: int = 0
    frames: int = 0

    @classmethod
    def allocate(cls, codec: Codec, pending: int) -> CodecState:
        """pending: P, vocoder frames that are computed again with each push."""
        config, like = codec.config, codec.conv1[0]
        counters = (torch.zeros((), dtype=torch.int64, device=codec.device) for _ in range(2))
        rate = config.pool * config.decoder_stride
        return cls(
            unpool=None if codec.unpool is None else ConvState.allocate(codec.unpool, config.pool, codec.dtype),
            position=next(counters),
            decoder=StackState.allocate(
                codec.decoder, config.decoder_layers, config.dim, decoder_context(config.decoder_window) + BLOCK, like
            ),
            to_mel=ConvState.allocate(codec.to_mel, rate, codec.dtype), frame=next(counters),
            mel=like.new_zeros(pending, config.n_mels),
            vocoder=StackState.allocate(
                codec.vocoder, config.vocoder_layers, config.vocoder_dim, config.vocoder_window[0], like
            ),
            tail=torch.zeros(2, config.n_fft - config.hop, device=codec.device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self))

    def reset(self) -> None:
        """Back to the beginning, in the same memory."""
        for tensor in _tensors(self):
            tensor.zero_()
        self.committed = self.frames = 0


def decoder_context(window: tuple[int, int]) -> int:
    """Positions before its own that a position sees: the window's left side where it is shorter than CONTEXT."""
    return min(window[0], CONTEXT) if window[0] >= 0 else CONTEXT


def _tensors(state: object) -> list[Tensor]:
    found: list[Tensor] = []
    for field in fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, ConvState | StackState):
            found += _tensors(value)
    return found
