"""Building blocks of the codec: pre-norm transformer layers with biased projections and GELU, convolutions, ISTFT."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import attention, window_attention
from ..kernels.norm import layer_norm, rms_norm
from ..kernels.qmatmul import Weight, matmul
from ..kernels.rope import rope, rope_table
from .transformer import GetTensor

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6
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
    qkv: Weight
    out: Weight
    ffn_norm: Norm
    up: Weight
    down: Weight

    @classmethod
    def load(cls, name: str, norm: str, get: GetTensor) -> "CodecLayer":
        def linear(part: str) -> Weight:
            return Weight.stack([get(f"{name}.{part}.weight")], [get(f"{name}.{part}.bias")])

        # k has no bias upstream.
        q_bias, v_bias = (get(f"{name}.self_attn.{part}_proj.bias") for part in "qv")
        blocks = [get(f"{name}.self_attn.{part}_proj.weight") for part in "qkv"]
        qkv = Weight.stack(blocks, [q_bias, torch.zeros_like(v_bias), v_bias])
        return cls(
            attention_norm=Norm.load(f"{name}.self_attn_layer_norm", norm, get), qkv=qkv,
            out=linear("self_attn.out_proj"), ffn_norm=Norm.load(f"{name}.final_layer_norm", norm, get),
            up=linear("fc1"), down=linear("fc2"),
        )


@dataclass(frozen=True)
class CodecStack:
    """Transformer layers over one sequence [T, D], with one attention pattern: full, causal or windowed."""

    layers: tuple[CodecLayer, ...]
    heads: int
    rope_theta: float
    causal: bool
    window: tuple[int, int]

    def __call__(self, x: Tensor, skip_layer: int | None = None) -> Tensor:
        """x [T, D] -> [T, D]; the output of layer `skip_layer` (counted from 1) is added to the last one's."""
        table = rope_table(x.shape[-1] // self.heads, self.rope_theta, len(x), x.device)
        skipped: Tensor | None = None
        for i, layer in enumerate(self.layers, start=1):
            x = x + matmul(self._attend(matmul(layer.attention_norm(x), layer.qkv), table), layer.out)
            x = x + matmul(F.gelu(matmul(layer.ffn_norm(x), layer.up)), layer.down)
            if i == skip_layer:
                skipped = x
        return x if skipped is None else x + skipped

    def _attend(self, qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k, v = (x.transpose(0, 1) for x in (rope(q, table), rope(k, table), v))
        left, right = self.window
        if left < 0 and right < 0:
            out = attention(q[None], k[None], v[None], self.causal)[0]
        else:
            right = 0 if self.causal else right
            # A negative reach is unlimited.
            out = window_attention(q, k, v, *(len(qkv) if reach < 0 else reach for reach in (left, right)))
        return out.transpose(0, 1).flatten(1)


def load_stack(
    name: str, layers: int, heads: int, causal: bool, window: tuple[int, int], norm: str, theta: float, get: GetTensor
) -> CodecStack:
    return CodecStack(
        tuple(CodecLayer.load(f"{name}.{i}", norm, get) for i in range(layers)), heads, theta, causal, window
    )


@dataclass(frozen=True)
class TransposedConv:
    """Causal transposed convolution, then GroupNorm over all of time and channels (upstream `CausalConvTranspose1d`).

    The norm sees the samples that are trimmed afterwards; its statistics run over the whole input, which is why
    decoding in chunks can only approach decoding at once.
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    stride: int

    @classmethod
    def load(cls, name: str, stride: int, get: GetTensor) -> "TransposedConv":
        conv, norm = ((get(f"{name}.{part}.weight"), get(f"{name}.{part}.bias")) for part in ("conv", "norm"))
        return cls(*conv, *norm, stride=stride)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D_in] -> [T stride, D_out]."""
        out = F.conv_transpose1d(x.T[None], self.weight, self.bias, self.stride)
        out = F.group_norm(out, 1, self.norm_weight, self.norm_bias)[0].T
        return out[: len(out) - max(0, self.weight.shape[-1] - self.stride)]


def inverse_stft(head: Tensor, window: Tensor, hop: int) -> Tensor:
    """Vocoder head output [T, n_fft + 2] (log-magnitudes, then phases) -> waveform [T hop] float32.

    "Same" padding: (n_fft - hop) / 2 samples are trimmed at either end (upstream `ISTFTHead`, `ISTFT`).
    """
    log_magnitude, phase = head.float().chunk(2, dim=-1)
    spectrum = torch.polar(log_magnitude.exp().clip(max=MAX_MAGNITUDE), phase)
    window = window.float()
    frames = torch.fft.irfft(spectrum, len(window), dim=-1) * window
    weights = window.square().expand(len(frames), -1)
    trim = (len(window) - hop) // 2
    length = len(frames) * hop
    wave, weight = (overlap_add(x, hop)[trim : trim + length] for x in (frames, weights))
    return wave / weight


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Frames [T, N] every `hop` samples -> their sum [(T - 1) hop + N]."""
    total = (len(frames) - 1) * hop + frames.shape[1]
    return F.fold(frames.T[None], (1, total), (1, frames.shape[1]), stride=(1, hop)).flatten()


def split_lengths(total: int, segment: int) -> Sequence[int]:
    """Lengths of the segments of `total`, all full but the last."""
    full, rest = divmod(total, segment)
    return [segment] * full + ([rest] if rest else [])
