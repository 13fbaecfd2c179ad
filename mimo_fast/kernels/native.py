"""The kernels of csrc/, present where this package was built with a C++ compiler on x86-64 Linux; they need AVX2.

MIMO_FAST_KERNELS=torch turns them off, as it does Triton's.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .dispatch import ENVIRONMENT
from .quantized_weight import QuantizedWeight

try:
    from mimo_fast import _native
except ImportError:  # Built without a compiler, or for a torch that brings no OpenMP.
    _native = None  # type: ignore[assignment]

BLOCKS = {4: (64, 128), 8: (32, 64, 128)}
"""Columns packed together that the kernels know, by bits."""


def available() -> bool:
    return _native is not None and _native.quantized_matmul_runs() and os.environ.get(ENVIRONMENT, "") != "torch"


def state() -> str:
    """One line for `mimo-fast info`."""
    if _native is None:
        return "not built (they need a C++ compiler when mimo-fast is installed, on x86-64 Linux)"
    if not _native.quantized_matmul_runs():
        return "built, but this CPU has no AVX2"
    return "quantized products on the CPU" if available() else f"turned off by {ENVIRONMENT}"


def takes(weight: QuantizedWeight) -> bool:
    """Whether `quantized_matmul` multiplies by a weight stored like this."""
    return (
        available() and weight.words.device.type == "cpu" and weight.words.is_contiguous()
        and weight.levels is None and weight.torch_scales is None
        and math.gcd(128, weight.group) in BLOCKS[weight.bits]
        and weight.scales.dtype == torch.bfloat16
        and (weight.zeros is None or weight.zeros.dtype == torch.float16)
    )  # fmt: skip


def quantized_matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x [..., K] -> x W^T + b [..., N], accumulated in float32 and rounded once.

    x is read with 16 bits for each block's largest value; rows of x do not depend on one another.
    """
    assert _native is not None
    if x.dtype not in (torch.float32, torch.bfloat16):
        return quantized_matmul(x.float(), weight).to(x.dtype)
    outputs, columns = weight.shape
    flat = x.reshape(-1, columns).contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    bias = None if weight.bias is None else weight.bias.to(x.dtype).contiguous()
    _native.quantized_matmul(
        x=flat.data_ptr(), y=y.data_ptr(), words=weight.words.data_ptr(), scales=weight.scales.data_ptr(),
        zeros=0 if weight.zeros is None else weight.zeros.data_ptr(), bias=0 if bias is None else bias.data_ptr(),
        type=_native.Type.float32 if x.dtype == torch.float32 else _native.Type.bfloat16, bits=weight.bits,
        block=math.gcd(128, weight.group), group=weight.group, M=len(flat), N=outputs, K=columns,
    )  # fmt: skip
    return y
