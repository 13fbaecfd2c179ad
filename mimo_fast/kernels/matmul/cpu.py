"""Products in plain torch, where neither Triton nor a native kernel takes them.

    unpacked    quantized, any x, any format: y = x.float() W^T + b, W unpacked some rows at a time
    packed      bfloat16, few rows, `pack_for_torch`: torch's product, which unpacks in registers
    widened     dense, 16 bits, many rows: y = x.float() W^T + b, W widened some rows at a time,
                where the CPU has no instructions for 16-bit products: a sixth of torch's time there

Shapes: x [..., K]; W [N, K]; b [N]; y [..., N]. All accumulate in float32 and round y to x.dtype;
torch's rounds once more before b is added, and rounds -scale zero to bfloat16, which costs less
than rounding the weight does.

A weight is held in one form, ours or torch's, which unpacks as fast. torch has these products for
float32 and float16 too, but without vector instructions.
benchmarks/results/2026-11-24-cpu-qmatmul.json has the figures behind PACKED_ROWS and
UNPACKED_AT_ONCE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.matmul.quantized_weight import (
    QuantizedWeight,
    dequantize,
    pack_torch_int4,
    torch_int4_order,
    unpack_words,
)

PACKED_ROWS = 64
"""Rows of x up to which torch's packed products are used: at 32 they are no slower than unpacking,
at 128 slower."""

WIDENED_ROWS = 8
"""Rows of x from which on a dense 16-bit weight is widened."""

UNPACKED_AT_ONCE = 2**18
"""Values: 1 MB of float32, which stay in the cache until they are multiplied, and whose memory
malloc reuses."""


def unpacked_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    wide, y = x.float(), x.new_empty(*x.shape[:-1], weight.shape[0])
    for some in _chunks(weight, 64):
        bias = None if weight.bias is None else weight.bias[some].float()
        y[..., some] = F.linear(wide, dequantize(weight, some.start, some.stop), bias)
    return y


def widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of a dense 16-bit weight [N, K], accumulated in float32 and rounded once."""
    wide, y = x.float(), x.new_empty(*x.shape[:-1], len(weight))
    step = max(1, UNPACKED_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        y[..., some] = F.linear(
            wide, weight[some].float(), None if bias is None else bias[some].float()
        )
    return y


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has products of this 16-bit type that use the CPU's own instructions."""
    known = torch.ops.mkldnn
    supported = (
        known._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else known._is_mkldnn_fp16_supported
    )
    return torch.backends.mkldnn.is_available() and bool(supported())


def packed_product(x: Tensor, weight: QuantizedWeight, torch_scales: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if weight.bits == 4:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, weight.words, weight.group, torch_scales
        )
    else:
        y = torch.ops.aten._weight_int8pack_mm(flat, weight.words, torch_scales)
    y = y if weight.bias is None else y + weight.bias
    return y.unflatten(0, x.shape[:-1]) if x.ndim > 1 else y[0]


def pack_for_torch(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight in the form of torch's CPU products where they take its format, for bfloat16
    activations.

    They want int8 by whole rows, or int4 with a linear grid and N in blocks, and scales that are
    bfloat16 already.
    """
    rows, columns = weight.shape
    plain = (
        weight.levels is None
        and weight.torch_scales is None
        and weight.scales.dtype == torch.bfloat16
    )
    if not plain or weight.words.device.type != "cpu":
        return weight
    if weight.bits == 8:
        return _pack_int8(weight) if weight.group == columns else weight
    order = torch_int4_order()
    return weight if order is None or rows % len(order) else _pack_int4(weight, len(order))


def _pack_int8(weight: QuantizedWeight) -> QuantizedWeight:
    words = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    for some in _chunks(weight, 1):
        words[some] = unpack_words(weight.words[some], 8, weight.group) - 128
    return replace(weight, words=words, torch_scales=weight.scales.flatten())


def _pack_int4(weight: QuantizedWeight, block: int) -> QuantizedWeight:
    rows, columns = weight.shape
    words = torch.empty(rows, columns // 2, dtype=torch.uint8, device="cpu")
    for some in _chunks(weight, block):
        words[some] = pack_torch_int4(unpack_words(weight.words[some], 4, weight.group))
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    offsets = -weight.scales.float() * zeros.float()
    pairs = torch.stack([weight.scales, offsets.bfloat16()], dim=-1).transpose(0, 1).contiguous()
    return replace(weight, words=words, torch_scales=pairs)


def _chunks(weight: QuantizedWeight, block: int) -> Iterator[slice]:
    """Rows, so many at a time as bounds the memory of unpacked values, in whole blocks."""
    rows, columns = weight.shape
    step = max(1, UNPACKED_AT_ONCE // columns // block) * block
    return (slice(start, start + step) for start in range(0, rows, step))
