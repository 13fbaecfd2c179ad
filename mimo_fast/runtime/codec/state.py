"""The tensors of incremental decodes: rows of fixed size, one a stream.

Positions and sums are tensors on the device and every row is updated in place, so that one
computation, or a captured graph, serves any rows. `pools.py` has who owns a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
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

ELASTIC_SETTLING = 125
"""SETTLING of an elastic stream.

What it begins with counts for more than what it learns, and its first samples are out before that:
decoding nano's speech sixteen times as often is worth 0.10 dB on average and 0.23 dB at most
(`benchmarks/results/2026-11-29-settling-2.json`).
"""

LINE = 64
"""Bytes of a cache line, on the boundary of which state begins."""

MeanVariance = tuple[Tensor, Tensor]
"""Mean and variance, float32 scalars."""


class NormStatistics(NamedTuple):
    """Mean and variance of each norm over time; `unpool` is None where the codec does not pool."""

    unpool: MeanVariance | None
    to_mel: MeanVariance


class StackState(NamedTuple):
    """Rotated keys and values that later positions of a stack see: [rows, layers, H, S, Dh] each.

    A single row's are without the first dimension.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class StateTensors:
    """Rows of state; the newest P vocoder frames of each are pending and may still change.

    Args:
        position: number of decoder positions done, int64 [rows]; slot p % S of `decoder` holds
            position p.
        entered: inputs of the decoder's layers for the pending frames, before the norm over time
            [rows, P / stride, D].
        added: what the layers added to them, float32 [rows, P / stride, D].
        history: normed outputs of the decoder before the pending ones, which the next convolution
            still reads [rows, positions, D].
        unpool, to_mel: sums of the norms over time, see `norms.py`, float64 [rows, 2, 3]; those of
            `to_mel` are without the pending frames.
        decoder: keys and values of the decoder's layers, a ring buffer.
        frame: number of vocoder frames so far, int64 [rows].
        vocoder: keys and values of the vocoder frames before the pending ones.
        tail: sums of windowed frames and of squared windows that later frames add to
            [rows, 2, n_fft - hop].
        given: norm statistics that a stream was given, float32 [rows, 2, 2]: of `unpool` and
            `to_mel`, mean and variance of each.
        prior: sums of earlier rows that count as if they preceded the stream's, float64
            [rows, 2, 3] of `unpool` and `to_mel`, each as a row of their `sums`; 0 for none.
        expected: rows of `unpool` and `to_mel` up to which missing ones are extrapolated, int64
            [rows, 2]; 0 for none.
    """

    position: Tensor
    entered: Tensor
    added: Tensor
    history: Tensor
    unpool: Tensor
    decoder: StackState
    to_mel: Tensor
    frame: Tensor
    vocoder: StackState
    tail: Tensor
    given: Tensor
    prior: Tensor
    expected: Tensor

    @classmethod
    def allocate(
        cls,
        config: CodecConfig,
        lookahead: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StateTensors:
        """lookahead: patches that a stream holds back at most."""
        stride = config.decoder_stride
        positions = pending_frames(config, lookahead) // stride
        history = -(-conv_overlap(config.decoder_kernel, stride) // stride)

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return untouched_zeros((rows, *shape), of, device)

        def stack(layers: int, heads: int, width: int, size: int) -> StackState:
            shape = layers, heads, size, width // heads
            return StackState(zeros(*shape), zeros(*shape))

        context = decoder_context(config.decoder_window) + BLOCK
        decoder = config.decoder_layers, config.decoder_heads, config.dim
        vocoder = config.vocoder_layers, config.vocoder_heads, config.vocoder_dim
        return cls(
            position=zeros(of=torch.int64),
            entered=zeros(positions, config.dim),
            added=zeros(positions, config.dim, of=torch.float32),
            history=zeros(history, config.dim),
            unpool=zeros(2, 3, of=torch.float64),
            decoder=stack(*decoder, context),
            to_mel=zeros(2, 3, of=torch.float64),
            frame=zeros(of=torch.int64),
            vocoder=stack(*vocoder, config.vocoder_window[0]),
            tail=zeros(2, config.n_fft - config.hop, of=torch.float32),
            given=zeros(2, 2, of=torch.float32),
            prior=zeros(2, 3, of=torch.float64),
            expected=zeros(2, of=torch.int64),
        )

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name; those of a stack are `decoder_k` and so on."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, StackState):
                yield f"{each.name}_k", value.k
                yield f"{each.name}_v", value.v
            else:
                yield each.name, value

    def each(self, change: Callable[[Tensor], Tensor]) -> StateTensors:
        """All tensors changed."""

        def changed(value: Any) -> Any:
            return (
                StackState(*map(change, value)) if isinstance(value, StackState) else change(value)
            )

        return StateTensors(*(changed(getattr(self, each.name)) for each in fields(self)))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.named())


def pending_frames(config: CodecConfig, lookahead: int) -> int:
    """P: vocoder frames that a stream with so many patches of look-ahead keeps pending."""
    stride = config.decoder_stride
    reach = -(-config.vocoder_layers * config.vocoder_window[1] // stride) * stride
    return max(reach, lookahead * patch_rows(config))


def row_bytes(config: CodecConfig, lookahead: int, dtype: torch.dtype) -> int:
    """Bytes of one stream's state."""
    return StateTensors.allocate(config, lookahead, 1, dtype, torch.device("meta")).nbytes


def integers(values: Sequence[Any], device: torch.device) -> Tensor:
    """int64 on the device; the host does not wait for it."""
    host = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def first_of(numbers: Sequence[int]) -> int | None:
    """The first of consecutive numbers, else None."""
    consecutive = [*numbers] == [*range(numbers[0], numbers[0] + len(numbers))]
    return numbers[0] if consecutive else None


@dataclass(frozen=True)
class Rows:
    """Rows of a pool that are computed together.

    Attributes:
        numbers: int64 [N] on the device.
        first: The first of them where they are consecutive, and read and written in place; None
            where they are not, or where a graph reads the numbers.
    """

    numbers: Tensor
    first: int | None = None

    @classmethod
    def of(cls, numbers: list[int], device: torch.device) -> Rows:
        return cls(integers(numbers, device), first_of(numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, tensor: Tensor) -> Tensor:
        """These rows [N, ...]: a copy, or a view."""
        if self.first is None:
            return tensor.index_select(0, self.numbers)
        return tensor.narrow(0, self.first, len(self))

    def write(self, tensor: Tensor, values: Tensor) -> None:
        if self.first is None:
            tensor.index_copy_(0, self.numbers, values)
        else:
            tensor.narrow(0, self.first, len(self)).copy_(values)

    def rewind(self, state: StateTensors) -> None:
        """Resets all but the waveform so far, to decode the codes again from the first."""
        for name, tensor in state.named():
            if name not in ("tail", "given", "prior", "expected"):
                self._zero(tensor)

    def reset(self, state: StateTensors) -> None:
        """Resets to the start of a waveform, with the same knowledge of norms."""
        self.rewind(state)
        self._zero(state.tail)

    def _zero(self, tensor: Tensor) -> None:
        if self.first is None:
            tensor.index_fill_(0, self.numbers, 0)
        else:
            tensor.narrow(0, self.first, len(self)).zero_()


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU memory is taken as they are written."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + LINE, dtype=np.uint8))
    start = -memory.data_ptr() % LINE
    return memory[start : start + size].view(dtype).view(*shape)


def decoder_context(window: tuple[int, int]) -> int:
    """Positions before its own that a position sees: the window's left side, at most CONTEXT."""
    return min(window[0], CONTEXT) if window[0] >= 0 else CONTEXT
