"""Input of the backbone: a table row at a text position, an encoded patch at an audio position.

    x[r] = patches[r]        where text[r] == empty_id
    x[r] = table[text[r]]    elsewhere; some row of it for NOT_FINITE (< 0), whose x nobody uses

Shapes: text [R] int64 (any stride, as the ids have), patches [R, D] (any stride over R; rows of
text positions are never read), x [R, D] in their dtype. The table is dense [V, D] or a
`QuantizedWeight`, of which one row is unpacked: scale (q - zero), each step rounded to float32,
then once to x's dtype.

A copy of a row, so only the launch and the latency of two dependent reads count. text is read on
the device, so a captured graph serves any token. Programs take 1024 columns of a row in 16-byte
accesses. A packed word is read once and its planes spread over a third axis of the block, which
follows the order of the columns (quantized_weight.py has the layout). The table may lie in pinned
host memory, from which a step then reads one row. Bytes: R D in and out, stored rows in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

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
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize

BLOCK_D = 1024
WARPS = 4


def input_embed_ref(
    text: Tensor, patches: Tensor, table: Tensor | QuantizedWeight, empty_id: int
) -> Tensor:
    is_audio = text == empty_id
    x = patches.clone(memory_format=torch.contiguous_format)
    ids = text[~is_audio]
    if isinstance(table, QuantizedWeight):
        x[~is_audio] = dequantize(table.take(ids)).to(x.dtype)
    else:
        x[~is_audio] = table[ids].to(x.dtype)
    return x


@jit
def dense_embed_kernel(
    text_ptr,
    patches_ptr,
    table_ptr,
    x_ptr,
    stride_t,
    stride_pr,
    stride_tv,
    stride_xr,
    EMPTY,
    D,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    i_text = tl.maximum(tl.load(text_ptr + i_row * stride_t), 0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_patch = o_d < tl.where(i_text == EMPTY, D, 0)
    m_table = o_d < tl.where(i_text == EMPTY, 0, D)
    b_patch = tl.load(patches_ptr + i_row * stride_pr + o_d, mask=m_patch, other=0.0)
    b_table = tl.load(table_ptr + i_text * stride_tv + o_d, mask=m_table, other=0.0)
    b_table = b_table.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + i_row * stride_xr + o_d, tl.where(m_patch, b_patch, b_table), mask=o_d < D)


@jit
def quantized_embed_kernel(
    text_ptr,
    patches_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    levels_ptr,
    x_ptr,
    stride_t,
    stride_pr,
    stride_xr,
    EMPTY,
    D,
    GROUP,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    PLANES: tl.constexpr = 32 // BITS
    WIDTH: tl.constexpr = BLOCK // PLANES
    i_row = tl.program_id(0).to(tl.int64)
    i_text = tl.maximum(tl.load(text_ptr + i_row * stride_t), 0).to(tl.int64)
    o_block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    o_plane, o_word = tl.arange(0, PLANES), tl.arange(0, WIDTH)
    d_table = tl.where(i_text == EMPTY, 0, D)
    m_block = o_block * BLOCK < d_table
    o_words = i_text * (D // PLANES) + o_block[:, None] * WIDTH + o_word[None, :]
    b_words = tl.load(words_ptr + o_words, mask=m_block[:, None], other=0)
    b_q = (b_words[:, None, :] >> (o_plane * BITS)[None, :, None]) & ((1 << BITS) - 1)
    b_x = tl.load(levels_ptr + b_q) if LEVELS else (b_q - (1 << (BITS - 1))).to(tl.float32)
    o_group = i_text * (D // GROUP) + o_block * BLOCK // GROUP
    if ZEROS:
        b_x -= load_float(zeros_ptr + o_group, m_block)[:, None, None]
    b_x *= load_float(scales_ptr + o_group, m_block)[:, None, None]
    o_d = o_block[:, None, None] * BLOCK + o_plane[None, :, None] * WIDTH + o_word[None, None, :]
    m_patch = o_d < D - d_table
    b_patch = tl.load(patches_ptr + i_row * stride_pr + o_d, mask=m_patch, other=0.0)
    b_x = tl.where(m_patch, b_patch, b_x.to(x_ptr.dtype.element_ty))
    tl.store(x_ptr + i_row * stride_xr + o_d, b_x, mask=o_d < D)


def input_embed(
    text: Tensor,
    patches: Tensor,
    table: Tensor | QuantizedWeight,
    empty_id: int,
    out: Tensor | None = None,
) -> Tensor:
    """text int64 [R], patches [R, D], table [V, D] -> [R, D] in the patches' dtype.

    out: written and returned where given.
    """
    rows, dim = patches.shape
    columns = table.shape[1]
    if tuple(text.shape) != (rows,) or columns != dim:
        raise ValueError(
            f"text {list(text.shape)}, patches {list(patches.shape)} and a table of width {columns}"
        )
    if out is not None and (out.shape != patches.shape or out.dtype != patches.dtype):
        raise ValueError(
            f"out {list(out.shape)} {out.dtype} must be as patches {list(patches.shape)} "
            f"{patches.dtype}"
        )
    if not use_triton(patches):
        x = input_embed_ref(text, patches, table, empty_id)
        return x if out is None else out.copy_(x)
    x = torch.empty(rows, dim, dtype=patches.dtype, device=patches.device) if out is None else out
    stored = table.words if isinstance(table, QuantizedWeight) else table
    if any(row.stride(-1) != 1 for row in (patches, stored, x)):
        raise ValueError("the rows of patches, table and out must be contiguous")
    arguments: dict[str, Any] = {
        "text_ptr": text,
        "patches_ptr": patches,
        "x_ptr": x,
        "stride_t": text.stride(0),
        "stride_pr": patches.stride(0),
        "stride_xr": x.stride(0),
        "EMPTY": empty_id,
        "D": dim,
        "num_warps": WARPS,
    }
    if isinstance(table, QuantizedWeight):
        _quantized(table, arguments, rows, dim)
    elif rows:
        block = min(BLOCK_D, next_power_of_2(dim))
        dense_embed_kernel[(rows, -(-dim // block))](
            **early_launch(patches, "dense_embed"),
            **arguments,
            table_ptr=table,
            stride_tv=table.stride(0),
            BLOCK_D=block,
        )
    return x


def _quantized(table: QuantizedWeight, arguments: dict[str, Any], rows: int, dim: int) -> None:
    block = math.gcd(128, table.group)
    if not table.words.is_contiguous() or not table.scales.is_contiguous():
        raise ValueError("a packed table must be contiguous")
    blocks = min(BLOCK_D // block, next_power_of_2(dim // block))
    if rows:
        quantized_embed_kernel[(rows, -(-dim // (blocks * block)))](
            **early_launch(arguments["patches_ptr"], "quantized_embed"),
            **arguments,
            words_ptr=table.words,
            scales_ptr=table.scales,
            zeros_ptr=table.scales if table.zeros is None else table.zeros,
            levels_ptr=table.scales if table.levels is None else table.levels,
            GROUP=table.group,
            BITS=table.bits,
            BLOCK=block,
            ZEROS=table.zeros is not None,
            LEVELS=table.levels is not None,
            BLOCKS=blocks,
        )


def input_embed_bytes(audio: int, texts: int, dim: int, itemsize: int, row_bytes: int) -> int:
    """Bytes that must move: patches, table rows and ids in, x out.

    row_bytes: a table row as stored.
    """
    return audio * (2 * dim * itemsize + 8) + texts * (row_bytes + dim * itemsize + 8)


def compile_cases() -> Iterator[Case]:
    """Width 4096: a dense table, int8 by rows, int4 with zeros, nf4."""
    shared = pointers(i64="text", bf16="patches x table", i32="words")
    yield Case(
        "input_embed dense",
        dense_embed_kernel,
        shared,
        {"BLOCK_D": BLOCK_D},
        WARPS,
        wide_loads=True,
        unaligned=("stride_t", "EMPTY"),
    )
    for name, bits, zeros, levels in (
        ("int8", 8, False, False),
        ("int4", 4, True, False),
        ("nf4", 4, False, True),
    ):
        scales = pointers(**{"fp32" if levels else "bf16": "scales zeros levels"})
        form = {"BITS": bits, "BLOCK": 128, "ZEROS": zeros, "LEVELS": levels}
        yield Case(
            f"input_embed {name}",
            quantized_embed_kernel,
            shared | scales | (pointers(fp16="zeros") if zeros else {}),
            form | {"BLOCKS": BLOCK_D // 128},
            WARPS,
            wide_loads=True,
            unaligned=("stride_t", "EMPTY"),
        )
