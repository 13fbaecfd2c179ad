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

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.dispatch import (
    Case,
    early_launch,
    jit,
    next_power_of_2,
    pdl_trigger,
    pdl_trigger_last,
    pdl_wait,
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
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    b_x = tl.load(x_ptr + i_row * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    pdl_trigger_last(PDL)
    tl.store(
        y_ptr + i_row * D + o_d, (b_x * b_scale * b_weight).to(y_ptr.dtype.element_ty), mask=m_d
    )


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
    tl.store(
        y_ptr + i_row * D + o_d,
        (b_centred * b_scale * b_weight + b_bias).to(y_ptr.dtype.element_ty),
        mask=m_d,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x.dtype."""
    if not use_triton(x):
        return rms_norm_ref(x, weight, eps)
    rows, y = (
        _rows(x, weight),
        torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out,
    )
    dim = x.shape[-1]
    rms_norm_kernel[(len(rows),)](
        **early_launch(x, "rms_norm"),
        x_ptr=rows,
        weight_ptr=weight,
        y_ptr=y,
        stride_x=rows.stride(0),
        D=dim,
        eps=eps,
        BLOCK_D=next_power_of_2(dim),
        num_warps=_warps(dim),
    )
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D] -> [..., D] in x.dtype."""
    if not use_triton(x):
        return layer_norm_ref(x, weight, bias, eps)
    rows, y = _rows(x, weight), torch.empty_like(x, memory_format=torch.contiguous_format)
    dim = x.shape[-1]
    layer_norm_kernel[(len(rows),)](
        x_ptr=rows,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        stride_x=rows.stride(0),
        D=dim,
        eps=eps,
        BLOCK_D=next_power_of_2(dim),
        num_warps=_warps(dim),
    )
    return y


def norm_bytes(rows: int, dim: int, itemsize: int) -> int:
    """Bytes that must move: activations in and out, the weight once."""
    return itemsize * (rows * dim * 2 + dim)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """x as [N, D] with contiguous rows, any stride between them."""
    if x.shape[-1] != len(weight):
        raise ValueError(f"the last dimension of {list(x.shape)} is not the weight's {len(weight)}")
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _warps(dim: int) -> int:
    """Warps a program: 16 values a thread at D = 4096, at least one warp."""
    return min(8, max(1, next_power_of_2(dim) // 512))


def compile_cases() -> Iterator[Case]:
    """Every configuration the launchers choose at the published widths."""
    rms = {
        "x_ptr": "*bf16",
        "weight_ptr": "*bf16",
        "y_ptr": "*bf16",
        "stride_x": "i32",
        "D": "i32",
        "eps": "fp32",
    }
    for dim in (4096, 1024):
        yield Case(
            f"rms_norm D={dim}",
            rms_norm_kernel,
            rms,
            {"BLOCK_D": next_power_of_2(dim)},
            _warps(dim),
        )
    layer = rms | {"bias_ptr": "*bf16"}
    for dim in (1280, 256):
        yield Case(
            f"layer_norm D={dim}",
            layer_norm_kernel,
            layer,
            {"BLOCK_D": next_power_of_2(dim)},
            _warps(dim),
        )
