"""Building blocks of the codec: pre-norm transformer layers with GELU, convolutions, ISTFT.

One-shot and incremental decoding (`incremental.py`) share them; the two differ in the attention
that a stack runs with and in the source of the statistics of the norms over time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.attention import attention, window_attention
from mimo_fast.kernels.cpu import codec_stack as small_codec
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.matmul.product import AnyWeight, matmul
from mimo_fast.kernels.norm import layer_norm, rms_norm
from mimo_fast.kernels.rope import rope, rope_frequencies, rope_rows, rope_table
from mimo_fast.kernels.sdpa import sdpa
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.geometry import conv_overlap
from mimo_fast.runtime.lm.transformer import Attend, GetTensor

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6
GROUP_NORM_EPS = 1e-5
MAX_MAGNITUDE = 1e2


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm where there is no bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def load(cls, name: str, kind: str, get: GetTensor) -> "Norm":
        return cls(get(f"{name}.weight"), get(f"{name}.bias") if kind == "LayerNorm" else None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, RMS_NORM_EPS)
        return layer_norm(x, self.weight, self.bias, LAYER_NORM_EPS)


@dataclass(frozen=True)
class CodecLayer:
    attention_norm: Norm
    qkv: AnyWeight
    out: AnyWeight
    ffn_norm: Norm
    up: AnyWeight
    down: AnyWeight

    @classmethod
    def load(cls, name: str, norm: str, source: WeightSource) -> "CodecLayer":
        def linear(part: str) -> AnyWeight:
            return source.weight(f"{name}.{part}", bias=True)

        # k has no bias upstream.
        parts = (f"{name}.self_attn.{part}_proj" for part in "qkv")
        return cls(
            attention_norm=Norm.load(f"{name}.self_attn_layer_norm", norm, source),
            qkv=source.weight(*parts, bias=(True, False, True)),
            out=linear("self_attn.out_proj"),
            ffn_norm=Norm.load(f"{name}.final_layer_norm", norm, source),
            up=linear("fc1"),
            down=linear("fc2"),
        )

    @property
    def parts(self) -> small_codec.Layer:
        """The layer's tensors in the order of `kernels/cpu/codec_stack.py`."""
        norms = [(norm.weight, norm.bias) for norm in (self.attention_norm, self.ffn_norm)]
        return norms[0], self.qkv, self.out, norms[1], self.up, self.down

    def __call__(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x [T, D] -> [T, D]; attend: qkv [T, 3 D] -> [T, D]."""
        x = matmul(attend(matmul(self.attention_norm(x), self.qkv)), self.out, residual=x)
        return matmul(F.gelu(matmul(self.ffn_norm(x), self.up)), self.down, residual=x)


@dataclass(frozen=True)
class CodecStack:
    """Transformer layers with one attention pattern: full, causal or windowed.

    `layers` is iterated once a run, so that an offloaded layer reaches the device only when it is
    used (`offload.py`).
    """

    layers: Iterable[CodecLayer]
    heads: int
    rope_theta: float
    causal: bool
    window: tuple[int, int]
    rounding: torch.dtype = torch.float32
    """Of `rope_frequencies`; every path rotates by the same ones."""

    @cached_property
    def executor(self) -> "LayerByLayer | small_codec.CodecStack":
        """What computes rows that attend to a buffer, and whole sequences: one native call, or
        layer by layer.

        Chosen once, by size, dtype and device; a copy with other layers chooses anew.
        """
        if not isinstance(self.layers, tuple) or not native.available():
            return LayerByLayer(self)
        layers = [layer.parts for layer in self.layers]
        if not small_codec.takes_stack(layers, self.heads):
            return LayerByLayer(self)
        eps = RMS_NORM_EPS if layers[0][0][1] is None else LAYER_NORM_EPS
        return small_codec.CodecStack(layers, self.heads, eps)

    @property
    def fused(self) -> bool:
        """Whether `executor` is one native call, which one thread computes fastest."""
        return isinstance(self.executor, small_codec.CodecStack)

    def run_sequences(
        self, sequences: Sequence[Tensor], skip_layer: int | None = None
    ) -> list[Tensor]:
        """Whole sequences x [T, D] -> [T, D] each, with the bits that each has alone.

        A layer's weights are read once for all sequences, or copied once where they are offloaded.
        skip_layer as in `run`.
        """
        executor = self.executor
        if isinstance(executor, LayerByLayer) or any(x.requires_grad for x in sequences):
            return LayerByLayer(self).run_sequences(sequences, skip_layer)
        frequencies = rope_frequencies(executor.head_dim, self.rope_theta, "cpu", self.rounding)
        tables = [rope_rows(frequencies, len(x)) for x in sequences]
        table = torch.cat(tables, dim=1) if tables else rope_rows(frequencies, 0)
        left, right = self.window
        window = left, 0 if self.causal else right
        return executor.run_sequences(sequences, table, window, skip_layer)

    def __call__(self, x: Tensor, skip_layer: int | None = None) -> Tensor:
        """One whole sequence x [T, D] -> [T, D]; skip_layer as in `run`."""
        return self.run(x, self.attend_to_all(x), skip_layer)

    def attend_to_all(self, x: Tensor) -> Attend:
        """The attention of one whole sequence x [T, D]."""
        head_dim, theta = x.shape[-1] // self.heads, self.rope_theta
        table = rope_table(head_dim, theta, len(x), x.device, self.rounding)
        return lambda _layer, qkv: self._attend(qkv, table)

    def run(self, x: Tensor, attend: Attend, skip_layer: int | None = None) -> Tensor:
        """x [T, D] -> [T, D]; attend: (layer, qkv [T, 3 D]) -> [T, D].

        The output of layer `skip_layer` (counted from 1) is added to the last one's.
        """
        skipped: Tensor | None = None
        out = x
        for i, out in enumerate(self.outputs(x, attend)):
            if i + 1 == skip_layer:
                skipped = out
        return out if skipped is None else out + skipped

    def outputs(self, x: Tensor, attend: Attend) -> Iterator[Tensor]:
        """The output of each layer [T, D], one after the other."""
        for i, layer in enumerate(self.layers):
            x = layer(x, lambda qkv, i=i: attend(i, qkv))  # type: ignore[misc]
            yield x

    def split_heads(self, qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, 3 D] and rows of `rope_table` -> rotated q, rotated k, v: [H, T, Dh] each."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
        return rope(q, table).transpose(0, 1), rope(k, table).transpose(0, 1), v.transpose(0, 1)

    def _attend(self, qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = self.split_heads(qkv, table)
        left, right = self.window
        if left < 0 and right < 0:
            out = attention(q[None], k[None], v[None], self.causal)[0]
        else:
            reaches = left, 0 if self.causal else right
            # A negative reach means no limit.
            limits = (len(qkv) if reach < 0 else reach for reach in reaches)
            out = window_attention(q, k, v, *limits)
        return out.transpose(0, 1).flatten(1)


class LayerByLayer:
    """`kernels/cpu/codec_stack.py`'s `CodecStack` for any stack on any device."""

    def __init__(self, stack: CodecStack) -> None:
        self._stack = stack

    def run(
        self, x: Tensor, table: Tensor, k: Tensor, v: Tensor, slots: Tensor, visible: Tensor
    ) -> Tensor:
        """x [T, D] -> [T, D]; keys and values go to `slots` [T] of k and v [L, H, S, Dh].

        Row t attends to the places that visible[t] marks, bool [T, S].
        """
        return self.run_rows(x[None], table[:, None], k[None], v[None], slots[None], visible[None])[
            0
        ]

    def run_rows(
        self,
        x: Tensor,
        table: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        visible: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """N sequences that attend to buffers, x [N, T, D] -> [N, T, D].

        Keys and values of sequence n go to slots[n] of row rows[n] of k and v [R, L, H, S, Dh], or
        of row n without `rows`. Position t attends to the places that visible[n, t] marks. A
        layer's weights are read once for all sequences.

        Args:
            table: rows of `rope_table` [2, N, T, Dh / 2].
            slots: int64 [N, T].
            visible: bool [N, T, S].
            rows: int64 [N].
        """
        places = torch.arange(len(x), device=x.device, dtype=torch.int64) if rows is None else rows
        places, shape, angles = places[:, None], x.shape[:2], table.flatten(1, 2)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, new_k, new_v = (
                part.transpose(0, 1).unflatten(0, shape)
                for part in self._stack.split_heads(qkv, angles)
            )
            keys, values = k[:, layer], v[:, layer]
            keys.transpose(1, 2).index_put_((places, slots), new_k)
            values.transpose(1, 2).index_put_((places, slots), new_v)
            if rows is not None:
                keys, values = keys.index_select(0, rows), values.index_select(0, rows)
            out = sdpa(q.transpose(1, 2), keys, values, attn_mask=visible[:, None])
            return out.transpose(1, 2).flatten(2).flatten(0, 1)

        return self._stack.run(x.flatten(0, 1), attend).view_as(x)

    def run_sequences(self, sequences: Sequence[Tensor], skip_layer: int | None) -> list[Tensor]:
        """See `CodecStack.run_sequences`.

        Every operation is of one sequence: a library may choose the order of a row's sums by the
        number of rows.
        """
        stack, parts = self._stack, [*sequences]
        attends = [stack.attend_to_all(x) for x in parts]
        skipped: list[Tensor] | None = None
        for i, layer in enumerate(stack.layers):
            parts = [layer(x, partial(attend, i)) for x, attend in zip(parts, attends, strict=True)]
            if i + 1 == skip_layer:
                skipped = parts
        if skipped is None:
            return parts
        return [x + early for x, early in zip(parts, skipped, strict=True)]


def ieee_convolutions() -> AbstractContextManager[None]:
    """Turns TF32, cuDNN's default, off: it would change codes."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@dataclass(frozen=True)
class TransposedConv:
    """Causal transposed convolution, then GroupNorm (upstream `CausalConvTranspose1d`).

    The norm's statistics are over all channels and the whole utterance, the rows trimmed afterwards
    included. A stream does not know them in advance, so it can only approximate one-shot decoding.
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    stride: int

    @classmethod
    def load(cls, name: str, stride: int, get: GetTensor) -> "TransposedConv":
        parts = (f"{name}.conv", f"{name}.norm")
        conv, norm = ((get(f"{part}.weight"), get(f"{part}.bias")) for part in parts)
        return cls(*conv, *norm, stride=stride)

    @property
    def overlap(self) -> int:
        """Output rows that consecutive inputs share."""
        return conv_overlap(self.weight.shape[-1], self.stride)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D_in] -> [T stride, D_out]."""
        out = self.convolve(x)
        return self.normalise(out[: len(out) - self.overlap], *self.statistics(out))

    def convolve(self, x: Tensor) -> Tensor:
        """[..., T, D_in] -> [..., T stride + overlap, D_out], before the norm."""
        if x.ndim == 3 and len(x) > 1 and x.device.type == "cpu":
            # The library would choose the order of sums by the number of sequences, and that alone
            # would take a stream's samples below 120 dB. These are 1% of the decoder's weights.
            return torch.stack([self.convolve(each) for each in x])
        with ieee_convolutions():
            return F.conv_transpose1d(x.mT, self.weight, self.bias, self.stride).mT

    def statistics(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the convolution's whole output, float32 scalars."""
        variance, mean = torch.var_mean(out.float(), correction=0)
        return mean, variance

    def normalise(self, out: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Norms the convolution's output [..., T, D_out] with these statistics, rounding once.

        mean, variance: scalars, or those of each sequence [..., 1, 1].
        """
        scale = torch.rsqrt(variance + GROUP_NORM_EPS) * self.norm_weight.float()
        return ((out.float() - mean) * scale + self.norm_bias.float()).to(out.dtype)


def inverse_stft(head: Tensor, window: Tensor, hop: int) -> Tensor:
    """Vocoder head output [T, n_fft + 2] (log-magnitudes, then phases) -> waveform [T hop] float32.

    Upstream `ISTFTHead` and `ISTFT` with "same" padding: (n_fft - hop) / 2 samples are trimmed at
    either end.
    """
    trim = (len(window) - hop) // 2
    wave, weight = synthesize(head, window, hop)[:, trim : trim + len(head) * hop]
    return wave / weight


def synthesize(head: Tensor, window: Tensor, hop: int) -> Tensor:
    """Head output [..., T, n_fft + 2] -> sums of frames and of squared windows.

    The sums are [..., 2, (T - 1) hop + n_fft].
    """
    log_magnitude, phase = head.float().chunk(2, dim=-1)
    # The clip would make a number of what is infinite.
    log_magnitude = log_magnitude.nan_to_num(torch.nan, torch.nan, torch.nan)
    spectrum = torch.polar(log_magnitude.exp().clip(max=MAX_MAGNITUDE), phase)
    frames = torch.fft.irfft(spectrum, len(window), dim=-1) * window
    weights = window.square().expand_as(frames)
    return overlap_add(torch.stack((frames, weights), dim=-3), hop)


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Frames [..., T, N] every `hop` samples -> their sums [..., (T - 1) hop + N]."""
    *batch, count, width = frames.shape
    total = (count - 1) * hop + width
    columns = frames.flatten(0, -3).mT if batch else frames.mT
    return F.fold(columns, (1, total), (1, width), stride=(1, hop)).view(*batch, total)


def split_lengths(total: int, segment: int) -> Sequence[int]:
    """Lengths of the segments of `total`, all full but the last."""
    full, rest = divmod(total, segment)
    return [segment] * full + ([rest] if rest else [])
