"""The next chunks of several streams of a small codec in one native call.

`CodecDecoder.decode` computes for each stream what `runtime/codec/incremental.py`'s `decode_chunk`
does: transposed convolution, norms over time, decoder layers over a ring of keys and values,
vocoder over pending and new frames, inverse STFT and overlap-add. Rows of all streams pass the
products together; streams are divided among the threads that the caller has. A stream's samples and
state have the same bits in any company.

It computes less than `decode_chunk`: of each vocoder layer only what a frame that becomes final, or
a later one, still sees. So a stream that is decoded again from its first code (`frames` = 0 with
samples that are out already) skips most of the vocoder's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.codec_stack import CodecStack, Norm
from mimo_fast.kernels.cpu.transformer import is_plain, linear
from mimo_fast.kernels.matmul.product import Weight

TYPES = {
    "position": torch.int64,
    "frame": torch.int64,
    "unpool_expected": torch.int64,
    "to_mel_expected": torch.int64,
    "unpool_sums": torch.float64,
    "to_mel_sums": torch.float64,
    "prior": torch.float64,
}
"""Types of a state's tensors; the others are float32."""


class TransposedConv(NamedTuple):
    """A causal transposed convolution and its norm over time.

    weight [D_in, D_out, kernel], kernel >= stride; bias, norm_weight and norm_bias [D_out].
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    stride: int


class Window(NamedTuple):
    """Positions before and after its own that a row sees."""

    left: int
    right: int


class Chunk(NamedTuple):
    """The next codes of a stream.

    Attributes:
        hidden: dequantized codes, float32 [T, D]; T may be 0.
        frames, committed: vocoder frames so far and those that are in the waveform, before this
            chunk. With frames = 0 the stream begins, or begins again: of its state nothing is read
            but the tail of the waveform, and that not with committed = 0.
        lookahead: vocoder frames held back after this chunk, unless it ends the stream.
        known: what the statistics of the norms over time are: 0 of the stream alone, 1 with those
            of `prior` before them, 2 those of `given`.
        ended: no codes follow, so all frames become final.
        settled: the statistics are not extrapolated.
    """

    buffers: Buffers
    row: int
    hidden: Tensor
    frames: int
    committed: int
    lookahead: int
    known: int
    ended: bool
    settled: bool


class Decoded(NamedTuple):
    """Samples [m] that are final now, and `frames` and `committed` after the chunk."""

    samples: Tensor
    frames: int
    committed: int


class Buffers:
    """States of several streams, read and written in place.

    Args:
        tensors: those of `CodecState` [rows, ...], a row contiguous, rows any stride apart; keys
            and values [rows, layers, H, S, Dh] may have any stride between layers.

    Raises:
        ValueError: shapes or types are others.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors
        self.checked: CodecDecoder | None = None
        rows = len(tensors["position"])
        for name, tensor in tensors.items():
            inner = tensor[0, 0] if name[-2:] in ("_k", "_v") and tensor.ndim == 5 else tensor[0]
            native.expect(
                len(tensor) == rows
                and tensor.dtype == TYPES.get(name, torch.float32)
                and inner.is_contiguous(),
                f"{name} is {tensor.dtype} {list(tensor.shape)}, not contiguous in {rows} rows",
            )
        self.shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
        places = {
            name: (native.address(tensor), tensor.stride(0), _layer_stride(tensor))
            for name, tensor in tensors.items()
        }
        self.native = native.compiled().CodecBuffers(
            rows=rows,
            entered_rows=tensors["entered"].shape[1],
            ring=tensors["decoder_k"].shape[3],
            **places,
        )


class CodecDecoder:
    """The decoder of a small codec; weights are read in place, those of convolutions copied.

    Args:
        decoder, vocoder: their layers.
        unpool: None where the codec does not pool.
        decoder_norm, vocoder_norm: of what the layers give.
        vocoder_in, vocoder_out: matrices around the vocoder's layers.
        context: positions before its own that a position of the decoder sees.
        blocks: positions of the decoder, and new frames of the vocoder, computed at once.
        frequencies: of decoder and vocoder, angle of one position for each pair of values.
        window: float32 [n_fft], n_fft even and at least `hop`.

    Raises:
        ValueError: parts do not fit each other.
    """

    def __init__(
        self,
        decoder: CodecStack,
        vocoder: CodecStack,
        unpool: TransposedConv | None,
        to_mel: TransposedConv,
        decoder_norm: Norm,
        vocoder_norm: Norm,
        vocoder_in: Weight,
        vocoder_out: Weight,
        context: int,
        vocoder_window: Window,
        blocks: tuple[int, int],
        frequencies: tuple[Tensor, Tensor],
        window: Tensor,
        hop: int,
    ) -> None:
        # In the order of the arguments, for copies, which read the copied weights.
        self._arguments = (
            decoder,
            vocoder,
            unpool,
            to_mel,
            decoder_norm,
            vocoder_norm,
            vocoder_in,
            vocoder_out,
            context,
            vocoder_window,
            blocks,
            frequencies,
            window,
            hop,
        )
        compiled, size = native.compiled(), len(window)
        parts = [unpool, to_mel] if unpool else [to_mel]
        # The native view reads matrices of the taps, one below the other, as long as it lives.
        self._taps = [_taps(part) for part in parts]
        convolutions = [_convolution(*pair) for pair in zip(parts, self._taps, strict=True)]
        tables = [each.float().contiguous() for each in (*frequencies, window)]
        native.expect(
            all(map(is_plain, tables)) and len(tables[0]) == decoder.head_dim // 2,
            "frequencies or the window are not float32 on a CPU",
        )
        native.expect(len(tables[1]) == vocoder.head_dim // 2, "frequencies are of other heads")
        self.native = compiled.CodecDecoder(
            decoder=decoder.native,
            vocoder=vocoder.native,
            unpool=convolutions[0] if unpool else None,
            to_mel=convolutions[-1],
            decoder_norm=decoder.norm(decoder_norm),
            vocoder_norm=vocoder.norm(vocoder_norm),
            vocoder_in=linear(vocoder_in),
            vocoder_out=linear(vocoder_out),
            context=context,
            left=vocoder_window.left,
            right=vocoder_window.right,
            decoder_block=blocks[0],
            vocoder_block=blocks[1],
            decoder_frequencies=native.address(tables[0]),
            vocoder_frequencies=native.address(tables[1]),
            window=native.address(tables[2]),
            size=size,
            hop=hop,
        )
        outer, inner = to_mel.weight.shape[2] - to_mel.stride, to_mel.stride
        self._dim = decoder.dim
        self._shapes = {
            "position": (),
            "frame": (),
            "added": (None, self._dim),
            "entered": (None, self._dim),
            "history": (-(-outer // inner), self._dim),
            "unpool_sums": (2, 3),
            "unpool_expected": (),
            "to_mel_sums": (2, 3),
            "to_mel_expected": (),
            "decoder_k": (decoder.layers, decoder.heads, None, decoder.head_dim),
            "decoder_v": (decoder.layers, decoder.heads, None, decoder.head_dim),
            "vocoder_k": (vocoder.layers, vocoder.heads, vocoder_window.left, vocoder.head_dim),
            "vocoder_v": (vocoder.layers, vocoder.heads, vocoder_window.left, vocoder.head_dim),
            "tail": (2, size - hop),
            "given": (2, 2),
            "prior": (2, 3),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def _check_buffers(self, buffers: Buffers) -> None:
        native.expect(
            buffers.shapes.keys() == self._shapes.keys(), "a state has other tensors than these"
        )
        for name, want in self._shapes.items():
            shape = buffers.shapes[name]
            fits = len(shape) == len(want) and all(
                right is None or left == right for left, right in zip(shape, want, strict=True)
            )
            native.expect(fits, f"{name} is {list(shape)} a row, not {list(want)}")
        native.expect(
            buffers.shapes["added"] == buffers.shapes["entered"]
            and buffers.shapes["decoder_k"] == buffers.shapes["decoder_v"],
            "buffers of a state do not fit each other",
        )
        buffers.checked = self

    def decode(self, chunks: Sequence[Chunk]) -> list[Decoded]:
        """Samples of each chunk, views of one tensor; its state advances.

        Raises:
            ValueError: a chunk does not fit its state, or two are of one row.
        """
        made, compiled = [], native.compiled()
        for buffers, row, hidden, *counts in chunks:
            if buffers.checked is not self:
                self._check_buffers(buffers)
            if (
                hidden.ndim != 2
                or hidden.shape[1] != self._dim
                or hidden.dtype != torch.float32
                or not hidden.is_contiguous()
            ):
                raise ValueError(
                    f"hidden is {hidden.dtype} {list(hidden.shape)}, not float32 [T, {self._dim}]"
                )
            made.append(
                compiled.CodecChunk(
                    buffers.native, row, native.address(hidden), len(hidden), *counts
                )
            )
        sizes = self.native.sizes(chunks=made)
        samples = torch.empty(sum(size for size, _, _ in sizes), dtype=torch.float32, device="cpu")
        self.native.decode(chunks=made, samples=samples.data_ptr())
        parts = samples.split([size for size, _, _ in sizes])
        return [
            Decoded(part, frames, committed)
            for part, (_, frames, committed) in zip(parts, sizes, strict=True)
        ]


def _taps(part: TransposedConv) -> Tensor:
    """Weights [D_in, D_out, kernel] -> a matrix [kernel D_out, D_in]."""
    return part.weight.detach().permute(2, 1, 0).reshape(-1, part.weight.shape[0]).contiguous()


def _convolution(part: TransposedConv, taps: Tensor) -> Any:
    """The native view of a convolution, which must not outlive `taps`."""
    vectors = part[1:4]
    native.expect(
        all(is_plain(each) and each.shape == part.weight.shape[1:2] for each in vectors),
        "a convolution's bias or norm is not float32 [D_out] on a CPU, contiguous and frozen",
    )
    return native.compiled().TransposedConv(
        weight=linear(Weight((taps,), (None,))),
        **native.addresses(bias=part.bias, norm_weight=part.norm_weight, norm_bias=part.norm_bias),
        kernel=part.weight.shape[2],
        stride=part.stride,
        outputs=part.weight.shape[1],
    )


def _layer_stride(tensor: Tensor) -> int:
    return tensor.stride(1) if tensor.ndim == 5 else 0
