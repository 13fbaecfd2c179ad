"""SwiGLU of a tensor that holds the gate in its first half and the values in its second.

    y[n, f] = silu(x[n, f]) x[n, F + f],  silu(g) = g / (1 + exp(-g))

Shapes: x [N, 2 F] (rows of any stride), y [N, F], in any float dtype. The kernel computes in
float32 and rounds once; the plain torch form rounds silu as well, as upstream does.

Elementwise, so bandwidth is all: 1024 values a program, 8 a thread, which is one 16-byte load a
half in 16-bit types. A decode step (N = 1, F = 11008) makes 11 programs, and its cost is the
launch; prefill fills the card with N times as many. Bytes: N F (2 reads + 1 write).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.dispatch import (
    Case,
    jit,
    load_float,
    next_power_of_2,
    pointers,
    tl,
    use_triton,
)

BLOCK_F = 1024
WARPS = 4


def swiglu_ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@jit
def swiglu_kernel(x_ptr, y_ptr, stride_x, F, BLOCK_F: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    b_gate = load_float(x_ptr + i_row * stride_x + o_f, m_f)
    b_up = load_float(x_ptr + i_row * stride_x + F + o_f, m_f)
    b_y = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(y_ptr + i_row * F + o_f, b_y, mask=m_f)


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 F] -> [..., F]."""
    if not use_triton(gate_up):
        return swiglu_ref(gate_up)
    width, odd = divmod(gate_up.shape[-1], 2)
    if odd:
        raise ValueError(
            f"the last dimension of {list(gate_up.shape)} must be even: gates, then as many values"
        )
    rows = gate_up.flatten(0, -2) if gate_up.ndim > 1 else gate_up[None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        swiglu_kernel[(len(rows), -(-width // BLOCK_F))](
            x_ptr=rows,
            y_ptr=y,
            stride_x=rows.stride(0),
            F=width,
            BLOCK_F=min(BLOCK_F, next_power_of_2(width)),
            num_warps=WARPS,
        )
    return y


def swiglu_bytes(rows: int, width: int, itemsize: int) -> int:
    """Bytes that must move: both halves in, one out."""
    return 3 * rows * width * itemsize


def compile_cases() -> Iterator[Case]:
    """One configuration, for the widths of the backbone (11008) and small transformers (4096)."""
    yield Case(
        "swiglu", swiglu_kernel, pointers(bf16="x y"), {"BLOCK_F": BLOCK_F}, WARPS, wide_loads=True
    )
