"""Products with quantized weights in plain torch: by unpacking, and by torch's packed products on a CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized_weight import DEQUANTIZED_AT_ONCE, QuantizedWeight, dequantize, unpack_words

CPU_PACKED_ROWS = 32
"""Rows of x up to which torch's packed CPU products beat unpacking the weight into a dense product."""


def quantized_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
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


def _slice(bias: Tensor | None, start: int, step: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[start : start + step].to(dtype)
