"""RMSNorm, alone or after a residual addition, and LayerNorm; over the last dimension.

    rms_norm:      y = x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm:  s = x + delta;  y = rms_norm(s)
    layer_norm:    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Shapes: x, delta, s, y [N, D]; weight, bias [D]. Statistics and scaling are float32; the sum s is rounded to its dtype
before it is normed, so that what is normed is what later layers read; y is rounded once (the plain torch RMSNorm rounds
before the weight as well, as Qwen2 does).

One program a row, the whole row in registers: D is at most 4096 here, 16 values a thread at 8 warps, so a row is read
once and written once and needs one reduction. Bytes: N D (2 reads + 2 writes) with the addition, N D (1 + 1) without.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Case, jit, next_power_of_2, tl, use_triton


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


@jit
def rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, stride_x, stride_delta, D, eps,
    ADD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(x_ptr + i_row * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    if ADD:
        b_x += tl.load(delta_ptr + i_row * stride_delta + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sum = b_x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + i_row * D + o_d, b_sum, mask=m_d)
        b_x = b_sum.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y_ptr + i_row * D + o_d, (b_x * b_scale * b_weight).to(y_ptr.dtype.element_ty), mask=m_d)


@jit
def layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, stride_x, D, eps, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(x_ptr + i_row * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_centred = tl.where(m_d, b_x - tl.sum(b_x, axis=0) / D, 0.0)
    b_scale = tl.rsqrt(tl.sum(b_centred * b_centred, axis=0) / D + eps)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y_ptr + i_row * D + o_d, (b_centred * b_scale * b_weight + b_bias).to(y_ptr.dtype.element_ty), mask=m_d)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x.dtype."""
    if not use_triton(x):
        return rms_norm_ref(x, weight, eps)
    rows, y = _rows(x, weight), torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    dim = x.shape[-1]
    rms_norm_kernel[(len(rows),)](
        x_ptr=rows, delta_ptr=rows, weight_ptr=weight, sum_ptr=y, y_ptr=y, stride_x=rows.stride(0), stride_delta=0,
        D=dim, eps=eps, ADD=False, BLOCK_D=next_power_of_2(dim), num_warps=_warps(dim),
    )
    return y


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and delta [..., D] -> (rms_norm(x + delta), x + delta)."""
    if not use_triton(x):
        total = x + delta
        return rms_norm_ref(total, weight, eps), total
    rows, deltas = _rows(x, weight), _rows(delta, weight)
    y, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    dim = x.shape[-1]
    rms_norm_kernel[(len(rows),)](
        x_ptr=rows, delta_ptr=deltas, weight_ptr=weight, sum_ptr=total, y_ptr=y, stride_x=rows.stride(0),
        stride_delta=deltas.stride(0), D=dim, eps=eps, ADD=True, BLOCK_D=next_power_of_2(dim), num_warps=_warps(dim),
    )
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D] -> [..., D] in x.dtype."""
    if not use_triton(x):
        return layer_norm_ref(x, weight, bias, eps)
    rows, y = _rows(x, weight), torch.empty_like(x, memory_format=torch.contiguous_format)
    dim = x.shape[-1]
    layer_norm_kernel[(len(rows),)](
        x_ptr=rows, weight_ptr=weight, bias_ptr=bias, y_ptr=y, stride_x=rows.stride(0), D=dim, eps=eps,
        BLOCK_D=next_power_of_2(dim), num_warps=_warps(dim),
    )
    return y


def norm_bytes(rows: int, dim: int, itemsize: int, add: bool) -> int:
    """Bytes that must move: activations in and out, the weight once."""
    return itemsize * (rows * dim * (4 if add else 2) + dim)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """x as [N, D] with contiguous rows, any stride between them."""
    if x.shape[-1] != len(weight):
        raise ValueError(f"the last dimension of {list(x.shape)} is not the weight's {len(weight)}")
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _warps(dim: int) -> int:
    """16 values a thread at 4096, and no fewer than one warp."""
    return min(8, max(1, next_power_of_2(dim) // 512))


def compile_cases() -> Iterator[Case]:
    """Every configuration the launchers choose at the published widths."""
    rms = {"x_ptr": "*bf16", "delta_ptr": "*bf16", "weight_ptr": "*bf16", "sum_ptr": "*bf16", "y_ptr": "*bf16",
           "stride_x": "i32", "stride_delta": "i32", "D": "i32", "eps": "fp32"}
    for dim, add in ((4096, True), (4096, False), (1024, True), (1024, False)):
        constexprs = {"ADD": add, "BLOCK_D": next_power_of_2(dim)}
        yield Case(f"rms_norm D={dim}{' +residual' * add}", rms_norm_kernel, rms, constexprs, _warps(dim))
    layer = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16", "stride_x": "i32",
             "D": "i32", "eps": "fp32"}
    for dim in (1280, 256):
        yield Case(f"layer_norm D={dim}", layer_norm_kernel, layer, {"BLOCK_D": next_power_of_2(dim)}, _warps(dim))
