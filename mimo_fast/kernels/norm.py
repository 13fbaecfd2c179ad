"""RMSNorm and LayerNorm over the last dimension.

    rms_norm:    y = x / sqrt(mean(x^2) + eps) * weight
    layer_norm:  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Shapes: x, y [N, D]; weight, bias [D]. Statistics and scaling are float32; y is rounded once (the
plain torch RMSNorm rounds before the weight as well, as Qwen2 does).

One program a row, the whole row in registers: D is at most 4096 here, 16 values a thread at 8
warps, so a row is read once, written once and reduced once. Bytes: N D (1 read + 1 write).

At decode a layer's RMSNorms are not launched: `matmul` takes an `RMSNorm` and normalizes x as it
reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.dispatch import (
    Case,
    early_launch,
    jit,
    load_float,
    next_power_of_2,
    pdl_trigger,
    pdl_trigger_last,
    pdl_wait,
    pointers,
    tl,
    use_triton,
)


@dataclass(frozen=True)
class RMSNorm:
    """An RMSNorm to apply: weight [D], and eps, which is added to the mean square."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D] in x.dtype."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


@jit
def rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, stride_x, D, eps, BLOCK_D: tl.constexpr, PDL: tl.constexpr
):
    pdl_trigger(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = load_float(weight_ptr + o_d, m_d)
    pdl_wait(PDL)
    b_x = load_float(x_ptr + i_row * stride_x + o_d, m_d)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    pdl_trigger_last(PDL)
    tl.store(y_ptr + i_row * D + o_d, b_x * b_scale * b_weight, mask=m_d)


@jit
def layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, stride_x, D, eps, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = load_float(x_ptr + i_row * stride_x + o_d, m_d)
    b_centred = tl.where(m_d, b_x - tl.sum(b_x, axis=0) / D, 0.0)
    b_scale = tl.rsqrt(tl.sum(b_centred * b_centred, axis=0) / D + eps)
    b_weight = load_float(weight_ptr + o_d, m_d)
    b_bias = load_float(bias_ptr + o_d, m_d)
    tl.store(y_ptr + i_row * D + o_d, b_centred * b_scale * b_weight + b_bias, mask=m_d)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x.dtype."""
    if not use_triton(x):
        return rms_norm_ref(x, weight, eps)
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    rows, arguments = _launch(x, weight, y, eps)
    rms_norm_kernel[(rows,)](**early_launch(x, "rms_norm"), **arguments)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D] -> [..., D] in x.dtype."""
    if not use_triton(x):
        return layer_norm_ref(x, weight, bias, eps)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, arguments = _launch(x, weight, y, eps)
    layer_norm_kernel[(rows,)](**arguments, bias_ptr=bias)
    return y


def norm_bytes(rows: int, dim: int, itemsize: int) -> int:
    """Bytes that must move: activations in and out, the weight once."""
    return itemsize * (rows * dim * 2 + dim)


def _launch(x: Tensor, weight: Tensor, y: Tensor, eps: float) -> tuple[int, dict[str, Any]]:
    """Programs and arguments of either kernel: x as [N, D] with contiguous rows."""
    dim = x.shape[-1]
    if dim != len(weight):
        raise ValueError(f"the last dimension of {list(x.shape)} is not the weight's {len(weight)}")
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return len(rows), {
        "x_ptr": rows,
        "weight_ptr": weight,
        "y_ptr": y,
        "stride_x": rows.stride(0),
        "D": dim,
        "eps": eps,
        "BLOCK_D": next_power_of_2(dim),
        "num_warps": _warps(dim),
    }


def _warps(dim: int) -> int:
    """Warps a program: 16 values a thread at D = 4096, at least one warp."""
    return min(8, max(1, next_power_of_2(dim) // 512))


def compile_cases() -> Iterator[Case]:
    """Every configuration the launchers choose at the published widths."""
    signature = pointers(bf16="x weight bias y") | {"eps": "fp32"}
    for kernel, dims in ((rms_norm_kernel, (4096, 1024)), (layer_norm_kernel, (1280, 256))):
        for dim in dims:
            name = f"{kernel.__name__.removesuffix('_kernel')} D={dim}"
            yield Case(name, kernel, signature, {"BLOCK_D": next_power_of_2(dim)}, _warps(dim))
