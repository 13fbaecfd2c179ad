"""Embedding of speech patches: for each frame, the sum of one table row for each channel's code.

    y[n, g] = sum_c table[offset_c + codes[n, c, g]]  where codes[n, c, g] != empty_c
    y[n, g] = NaN                                     where any codes[n, c, g] is NOT_FINITE (< 0)

So a patch that could not be drawn shows itself in what is computed from it.

Shapes: codes [N, C, G] int64 (any strides, as the sampler's output has), table [sum V_c, D],
offsets and empty [C] int64, y [N, G, D] in the table's dtype. All channels share one table; channel
c owns rows offset_c ... offset_c + V_c - 1. The sum is float32 in the order of the channels and
rounded once. The row of an empty code is never read.

A gather has no reuse, so bytes in flight decide. The channels are unrolled: the loads of all codes
overlap, then the loads of all rows, 16 bytes a thread in 16-bit types. A prefill has thousands of
frames: a program takes 1024 columns of one, so the codes are read once where D = 1024. A decode
step has G = 4 frames and would leave a card idle: its programs take 256 columns, a warp each.
Bytes: N G (C D reads + D writes + 8 C of codes).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mimo_fast.kernels.dispatch import (
    Case,
    early_launch,
    jit,
    load_float,
    next_power_of_2,
    pdl_trigger,
    pdl_wait,
    pointers,
    tl,
    use_triton,
)

FEW_FRAMES = 128
"""Number of frames below which a frame is split over several programs."""


def patch_embed_ref(codes: Tensor, table: Tensor, offsets: Tensor, empty: Tensor) -> Tensor:
    rows = table[codes.clamp(min=0) + offsets[:, None]]
    sums = rows.masked_fill((codes == empty[:, None])[..., None], 0).sum(1)
    return sums.masked_fill((codes < 0).any(1)[..., None], torch.nan)


@jit
def patch_embed_kernel(
    codes_ptr,
    table_ptr,
    offsets_ptr,
    empty_ptr,
    y_ptr,
    stride_cn,
    stride_cc,
    stride_cg,
    stride_table,
    G,
    D,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_frame = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    codes_ptr += i_frame // G * stride_cn + i_frame % G * stride_cg
    b_y = tl.zeros([BLOCK_D], tl.float32)
    lost = 0
    for i_c in tl.static_range(C):
        b_code = tl.load(codes_ptr + i_c * stride_cc)
        b_row = (b_code + tl.load(offsets_ptr + i_c)).to(tl.int64)
        b_width = tl.where((b_code == tl.load(empty_ptr + i_c)) | (b_code < 0), 0, D)
        lost = lost | (b_code < 0).to(tl.int32)
        b_y += load_float(table_ptr + b_row * stride_table + o_d, o_d < b_width)
    tl.store(y_ptr + i_frame * D + o_d, tl.where(lost > 0, float("nan"), b_y), mask=m_d)


def patch_embed(codes: Tensor, table: Tensor, offsets: Tensor, empty: Tensor) -> Tensor:
    """codes [N, C, G], table [sum V_c, D], offsets and empty [C] -> [N, G, D]."""
    if not use_triton(table):
        return patch_embed_ref(codes, table, offsets, empty)
    patches, channels, frames = codes.shape
    dim = table.shape[1]
    if len(offsets) != channels or len(empty) != channels:
        raise ValueError(
            f"{channels} channels of codes, but {len(offsets)} offsets and {len(empty)} empty codes"
        )
    if table.stride(1) != 1 or offsets.stride(0) != 1 or empty.stride(0) != 1:
        raise ValueError("rows of the table, offsets and empty codes must be contiguous")
    y = torch.empty(patches, frames, dim, dtype=table.dtype, device=table.device)
    if y.numel():
        block, warps = _tile(patches * frames, dim)
        patch_embed_kernel[(patches * frames, -(-dim // block))](
            **early_launch(codes, "patch_embed"),
            codes_ptr=codes,
            table_ptr=table,
            offsets_ptr=offsets,
            empty_ptr=empty,
            y_ptr=y,
            stride_cn=codes.stride(0),
            stride_cc=codes.stride(1),
            stride_cg=codes.stride(2),
            stride_table=table.stride(0),
            G=frames,
            D=dim,
            C=channels,
            BLOCK_D=block,
            num_warps=warps,
        )
    return y


def patch_embed_bytes(patches: int, channels: int, frames: int, dim: int, itemsize: int) -> int:
    """Bytes that must move when no code is empty: rows and codes in, sums out."""
    return patches * frames * ((channels + 1) * dim * itemsize + channels * 8)


def _tile(frames: int, dim: int) -> tuple[int, int]:
    """(BLOCK_D, warps)."""
    block, warps = (256, 1) if frames < FEW_FRAMES else (1024, 4)
    return min(block, next_power_of_2(dim)), warps


def compile_cases() -> Iterator[Case]:
    """Both configurations at 8 channels of width 1024."""
    for name, frames in (("decode", 4), ("prefill", FEW_FRAMES)):
        block, warps = _tile(frames, 1024)
        yield Case(
            f"patch_embed {name}",
            patch_embed_kernel,
            pointers(i64="codes offsets empty", bf16="table y"),
            {"C": 8, "BLOCK_D": block},
            warps,
            wide_loads=True,
            unaligned=("stride_cn", "stride_cc", "stride_cg", "G"),
        )
