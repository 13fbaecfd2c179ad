"""Matrix product with a stored weight, dense or quantized: y = x W^T + b, and what a layer does around it at once.

    plain            y = x W^T + b
    norm=n           y = (x / sqrt(mean(x^2) + eps) * n) W^T + b       in place of the plain product
    swiglu=True      y = silu(gate) * up       W has the rows of gate, then those of up
    residual=r       y = r + the above

Shapes: x [..., K]; W [N, K]; b [N]; n [K]; y and r [..., N], or [..., N / 2] with swiglu. Products are accumulated in
float32.

A `Weight` is dense: row blocks, because upstream stores q/k/v and gate/up apart and a memory-mapped file must not be
copied to join them. A `QuantizedWeight` is one joined matrix, w = scale (q - zero), with a scale and a zero for each
group of values along K. Its q are packed so that a thread which loads 16 bytes can unpack them by shift and mask into
values that meet consecutive x: a block of up to 128 columns is W words of P planes, and plane p of word w is column
p W + w of the block.

    4 bits, block of 128: 16 words, 8 planes            8 bits, block of 128: 32 words, 4 planes
    word      0    1    2  ...  15                      word      0    1    2  ...  31
    bits 0-3  k0   k1   k2      k15                     bits 0-7   k0   k1   k2      k31
    bits 4-7  k16  k17  k18     k31                     bits 8-15  k32  k33  k34     k63
       ...                                                 ...
    bits 28+  k112 k113 k114    k127                    bits 24+   k96  k97  k98     k127

q is stored as an offset: q + 8 or q + 128. Bytes of a product: those of the weight, once, plus x, n, r and y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import use_triton
from .norm import RMSNorm
from .qmatmul_launch import GEMV_ROWS, dense_gemv, fits_quantized, fuses_norm, quantized_matmul
from .swiglu import swiglu as swiglu_op

DEQUANTIZED_AT_ONCE = 2**22
"""Values that the plain product unpacks at a time: bounds its memory."""

CPU_PACKED_ROWS = 32
"""Rows of x up to which torch's packed CPU products beat unpacking the weight into a dense product."""


@dataclass(frozen=True)
class Weight:
    """Row blocks [N_i, K] of one matrix, and as many biases [N_i] or none."""

    blocks: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @classmethod
    def stack(cls, blocks: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> Weight:
        return cls(tuple(blocks), tuple(biases) or (None,) * len(blocks))

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read."""
        return _nbytes(*self.blocks, *self.biases)


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix [N, K] in packed form.

    Args:
        words: int32 [N, K bits / 32], see the module.
        scales: floating [N, K / group].
        zeros: floating [N, K / group], or None for none.
        bias: [N] or None.
        bits: of a value, 4 or 8.
        levels: float32 [16], for a table of levels in place of q - 8.
        packed: the same values in the form of torch's CPU products; `pack_for_cpu` makes it.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    bits: int
    levels: Tensor | None = None
    packed: tuple[Tensor, Tensor] | None = None

    @classmethod
    def stack(cls, blocks: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Joins the rows of matrices of one format.

        Raises:
            ValueError: they differ in width or format.
        """
        first = blocks[0]
        if len(blocks) == 1:
            return first
        if any(block._form != first._form for block in blocks):
            raise ValueError("matrices of different widths or formats cannot be joined: give their part one format")
        biased = any(block.bias is not None for block in blocks)
        return replace(
            first, words=torch.cat([block.words for block in blocks]),
            scales=torch.cat([block.scales for block in blocks]),
            zeros=torch.cat([block.zeros for block in blocks if block.zeros is not None]) if first.zeros is not None
            else None,
            bias=torch.cat([block._bias_or_zeros for block in blocks]) if biased else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.words.shape[0], self.words.shape[1] * 32 // self.bits

    @property
    def group(self) -> int:
        """Values along K that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read."""
        return _nbytes(self.words, self.scales, self.zeros, self.bias)

    def take(self, rows: Tensor) -> QuantizedWeight:
        """The rows of these indices [R], as for an embedding."""
        zeros, bias = (None if t is None else t[rows] for t in (self.zeros, self.bias))
        return replace(self, words=self.words[rows], scales=self.scales[rows], zeros=zeros, bias=bias, packed=None)

    @property
    def _form(self) -> tuple[object, ...]:
        return self.shape[1], self.group, self.bits, self.scales.dtype, self.zeros is None, self.levels is None

    @property
    def _bias_or_zeros(self) -> Tensor:
        # Scales may be of a wider dtype than activations; a bias, where any block has one, sets it in torch.cat.
        return self.scales.new_zeros(len(self.words)) if self.bias is None else self.bias


def pack_words(q: Tensor, bits: int, group: int) -> Tensor:
    """Offsets [N, K] (0 ... 2^bits - 1) -> int32 words [N, K bits / 32]."""
    planes = 32 // bits
    width = math.gcd(128, group) // planes
    split = q.to(torch.int32).unflatten(1, (-1, planes, width))
    words = split[:, :, 0].clone()
    for plane in range(1, planes):
        words |= split[:, :, plane] << (bits * plane)
    return words.flatten(1)


def unpack_words(words: Tensor, bits: int, group: int) -> Tensor:
    """The inverse of `pack_words`: int32 offsets [N, K]."""
    planes = 32 // bits
    split = words.unflatten(1, (-1, 1, math.gcd(128, group) // planes))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)[:, None]
    return ((split >> shifts) & (2**bits - 1)).flatten(1)


def dequantize(weight: QuantizedWeight, start: int = 0, end: int | None = None) -> Tensor:
    """Rows start ... end as float32 [R, K]: scale (q - zero), each step rounded to float32."""
    rows = slice(start, end)
    offsets = unpack_words(weight.words[rows], weight.bits, weight.group)
    values = (offsets - (1 << (weight.bits - 1))).float() if weight.levels is None else weight.levels[offsets]
    grouped = values.unflatten(1, (-1, weight.group))
    if weight.zeros is not None:
        grouped -= weight.zeros[rows].float()[..., None]
    return (grouped * weight.scales[rows].float()[..., None]).flatten(1)


def dequantize_to(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """All of it in a dtype [N, K]; float32 copies are of a few rows at a time."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    step = max(1, DEQUANTIZED_AT_ONCE // weight.shape[1])
    for start in range(0, len(out), step):
        out[start : start + step] = dequantize(weight, start, start + step)
    return out


def matmul(
    x: Tensor, weight: Weight | QuantizedWeight, *, norm: RMSNorm | None = None, residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """x [..., K], normed first by `norm` -> [..., N], or [..., N / 2] with swiglu; residual is shaped as the result."""
    if not use_triton(x):
        return matmul_ref(x, weight, norm=norm, residual=residual, swiglu=swiglu)
    if isinstance(weight, QuantizedWeight):
        if fits_quantized(weight):
            if norm is not None and not fuses_norm(x):
                x, norm = norm(x), None
            return quantized_matmul(x, weight, norm, residual, swiglu)
    elif 0 < x.numel() <= GEMV_ROWS * x.shape[-1]:
        if len(weight.blocks) == 1:
            return dense_gemv(x, weight.blocks[0], weight.biases[0], norm, residual, swiglu)
        pairs = zip(weight.blocks, weight.biases, strict=True)
        parts = [dense_gemv(x, *pair, norm, None, False) for pair in pairs]
        return _epilogues(torch.cat(parts, dim=-1), residual, swiglu)
    return matmul_ref(x, weight, norm=norm, residual=residual, swiglu=swiglu)


def matmul_ref(
    x: Tensor, weight: Weight | QuantizedWeight, *, norm: RMSNorm | None = None, residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """The norm, the product and each epilogue one after the other, every one rounded to x.dtype."""
    x = x if norm is None else norm(x)
    y = _dense_product(x, weight) if isinstance(weight, Weight) else _quantized_product(x, weight)
    return _epilogues(y, residual, swiglu)


def _epilogues(y: Tensor, residual: Tensor | None, swiglu: bool) -> Tensor:
    y = swiglu_op(y) if swiglu else y
    return y if residual is None else residual + y


def _dense_product(x: Tensor, weight: Weight) -> Tensor:
    parts = [F.linear(x, block, bias) for block, bias in zip(weight.blocks, weight.biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _quantized_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"the last dimension of {list(x.shape)} is not the weight's {columns}")
    if weight.packed is not None and x.dtype == torch.bfloat16 and 0 < x.numel() <= CPU_PACKED_ROWS * columns:
        return _packed_product(x, weight, *weight.packed)
    step = max(1, DEQUANTIZED_AT_ONCE // columns)
    parts = [
        F.linear(x, dequantize(weight, start, start + step).to(x.dtype), _slice(weight.bias, start, step, x.dtype))
        for start in range(0, rows, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _packed_product(x: Tensor, weight: QuantizedWeight, packed: Tensor, scales: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if weight.bits == 4:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, weight.group, scales)
    else:
        y = torch.ops.aten._weight_int8pack_mm(flat, packed, scales)
    y = y if weight.bias is None else y + weight.bias
    return y.unflatten(0, x.shape[:-1]) if x.ndim > 1 else y[0]


def pack_for_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    """Adds the form that torch's CPU products read, where they take this format: then bfloat16 decoding is fast.

    They want N in 16s, int8 by whole rows or int4 with a linear grid, and bfloat16 scales, which must lose nothing. It
    takes as much memory again as the words, which long inputs still use.
    """
    scales = weight.scales.bfloat16()
    rows, columns = weight.shape
    usable = rows % 16 == 0 and weight.levels is None and torch.equal(scales.float(), weight.scales.float())
    if not usable or weight.words.device.type != "cpu":
        return weight
    q = unpack_words(weight.words, weight.bits, weight.group)
    if weight.bits == 8 and weight.group == columns and hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        return replace(weight, packed=((q - 128).to(torch.int8), scales.flatten()))
    if weight.bits == 4 and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        zeros = torch.zeros_like(scales) if weight.zeros is None else weight.zeros
        offset = -(weight.scales.float() * zeros.float())
        pairs = torch.stack([scales, offset.bfloat16()], dim=-1).transpose(0, 1).contiguous()
        return replace(weight, packed=(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2), pairs))
    return weight


def qmatmul_bytes(
    rows: int, weight: Weight | QuantizedWeight, outputs: int, itemsize: int, *, norm: bool = False,
    residual: bool = False,
) -> int:
    """Bytes that must move for M rows of x: the weights once, x and the residual in, y [M, outputs] out."""
    columns = weight.blocks[0].shape[1] if isinstance(weight, Weight) else weight.shape[1]
    activations = rows * (columns + (2 if residual else 1) * outputs) + (columns if norm else 0)
    return weight.nbytes + activations * itemsize


def _slice(bias: Tensor | None, start: int, step: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[start : start + step].to(dtype)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
