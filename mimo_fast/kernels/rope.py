"""Rotary position embedding, half-split form as in Qwen2, and the append to the cache.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  angle = position / theta^(2 i / Dh)

where x1 and x2 are the halves of a head. Angles, cosines and the rotation are float32 whatever the
activations are; y is rounded once, to x's dtype.

    rope         x [..., T, H, Dh] (any strides but the last), table [2, ..., T, Dh / 2] of its
                 positions -> y
    rope_append  qkv [R, T, (H + 2 Hkv) Dh], the table of all positions [2, P, Dh / 2]. Row r holds
                 positions starts[r] ... starts[r] + T - 1 of cache slot slots[r]: q and k are
                 rotated there, k and v written to the cache (`kv_cache.py`, which quantizes them or
                 not), q returned as [R, H, T, Dh].

slots and starts are read on the device, so a captured graph can be replayed at the next position.
Nothing is written for a position outside the cache or the table: one replay too many must not write
into the next slot.

A program rotates about 1024 values, some heads of one position: each thread 8 of either half, which
are 16-byte loads in 16-bit types. All heads of a position share Dh / 2 angles, which come from L1.
Bytes: rope N T H Dh (1 read + 1 write); rope_append R T (H + 2 Hkv) Dh (1 + 1); and 4 Dh a position
of angles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
from mimo_fast.kernels.kv_cache import (
    APPEND_UNALIGNED,
    LayerKV,
    append_signature,
    scale_of,
    to_levels,
)

WARPS = 2


def rope_frequencies(
    head_dim: int,
    theta: float,
    device: torch.device | str = "cpu",
    rounding: torch.dtype = torch.float32,
) -> Tensor:
    """Angle of one position for each pair of a head's values: [head_dim / 2] float32.

    rounding: the values are those of this dtype, as of a model that was cast to it with its
        buffers; the arithmetic after that is float32 as ever.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return (1.0 / theta**exponents).to(rounding).float()


def rope_table(
    head_dim: int,
    theta: float,
    positions: int,
    device: torch.device | str = "cpu",
    rounding: torch.dtype = torch.float32,
) -> Tensor:
    """cos and sin of every position: [2, positions, head_dim / 2] float32.

    rounding: of `rope_frequencies`.
    """
    return rope_rows(rope_frequencies(head_dim, theta, device, rounding), positions)


def rope_rows(frequencies: Tensor, positions: int) -> Tensor:
    """`rope_table` of given frequencies, float32 [head_dim / 2]."""
    places = torch.arange(positions, device=frequencies.device, dtype=torch.int64).float()
    angles = torch.outer(places, frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rope_ref(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_append_ref(
    qkv: Tensor, table: Tensor, cache: LayerKV, slots: Tensor, starts: Tensor, heads: int
) -> Tensor:
    new, kv_heads = qkv.shape[1], cache.k.shape[1]
    q, k, v = qkv.unflatten(-1, (-1, cache.k.shape[-1])).split((heads, kv_heads, kv_heads), dim=2)
    rotated = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    for row, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        if start + new <= 0:  # The row has no position inside the cache.
            rotated[row] = 0
            continue
        angles = table[:, start : start + new]
        rotated[row] = rope_ref(q[row], angles).transpose(0, 1)
        cache.append(
            slot, start, rope_ref(k[row].float(), angles).transpose(0, 1), v[row].transpose(0, 1)
        )
    return rotated


@jit
def rotate(b_first, b_second, b_cos, b_sin):
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@jit
def load_angles(cos_ptr, sin_ptr, o_position, o_d, m_angle, HALF: tl.constexpr):
    """cos and sin for each of the Dh values of a head."""
    o_angle = o_position * HALF + o_d % HALF
    return tl.load(cos_ptr + o_angle, mask=m_angle, other=0.0), tl.load(
        sin_ptr + o_angle, mask=m_angle, other=0.0
    )


@jit
def load_rotated(x_ptr, o_x, o_d, m_x, b_cos, b_sin, HALF: tl.constexpr):
    """Whole rotated heads at o_x, float32; every argument broadcasts to o_x + o_d.

    The other half of a head is read again, from L1.
    """
    b_x = load_float(x_ptr + o_x + o_d, m_x)
    o_other = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)
    b_other = load_float(x_ptr + o_x + o_other, m_x)
    return b_x * b_cos + tl.where(o_d < HALF, -b_other, b_other) * b_sin


@jit
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    stride_xn,
    stride_xt,
    stride_xh,
    T_TABLE,
    T,
    H,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_n, i_t = i_row // T, i_row % T
    o_half = tl.arange(0, BLOCK_HALF)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_half = o_half < HALF
    m_x = (o_h < H)[:, None] & m_half[None, :]
    o_angle = (i_n * T_TABLE + i_t) * HALF + o_half
    b_cos = tl.load(cos_ptr + o_angle, mask=m_half, other=0.0)[None, :]
    b_sin = tl.load(sin_ptr + o_angle, mask=m_half, other=0.0)[None, :]
    x_ptr += i_n * stride_xn + i_t * stride_xt
    o_x = o_h[:, None] * stride_xh + o_half[None, :]
    b_first = load_float(x_ptr + o_x, m_x)
    b_second = load_float(x_ptr + HALF + o_x, m_x)
    b_first, b_second = rotate(b_first, b_second, b_cos, b_sin)
    y_ptr += i_row * H * 2 * HALF
    o_y = o_h[:, None] * 2 * HALF + o_half[None, :]
    tl.store(y_ptr + o_y, b_first, mask=m_x)
    tl.store(y_ptr + HALF + o_y, b_second, mask=m_x)


@jit
def rope_append_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    slots_ptr,
    starts_ptr,
    stride_xr,
    stride_xt,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_sb,
    stride_sh,
    LIMIT,
    T,
    H,
    HKV,
    HALF: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_r, i_t = i_row // T, i_row % T
    i_slot = tl.load(slots_ptr + i_r).to(tl.int64)
    i_position = tl.load(starts_ptr + i_r).to(tl.int64) + i_t
    b_half = tl.where((i_position >= 0) & (i_position < LIMIT), HALF, 0)
    o_half = tl.arange(0, BLOCK_HALF)[None, :]
    o_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    m_half = o_half < b_half
    m_x = m_half & (o_h < H + 2 * HKV)
    b_cos = tl.load(cos_ptr + i_position * HALF + o_half, mask=m_half, other=0.0)
    b_sin = tl.load(sin_ptr + i_position * HALF + o_half, mask=m_half, other=0.0)
    qkv_ptr += i_r * stride_xr + i_t * stride_xt
    o_x = o_h * 2 * HALF + o_half
    b_first = load_float(qkv_ptr + o_x, m_x)
    b_second = load_float(qkv_ptr + HALF + o_x, m_x)
    b_rotated_first, b_rotated_second = rotate(b_first, b_second, b_cos, b_sin)
    b_first = tl.where(o_h < H + HKV, b_rotated_first, b_first)
    b_second = tl.where(o_h < H + HKV, b_rotated_second, b_second)

    m_q = m_x & (o_h < H)
    o_q = (i_r * H + o_h) * T * 2 * HALF + i_t * 2 * HALF + o_half
    tl.store(q_ptr + o_q, b_first, mask=m_q)
    tl.store(q_ptr + HALF + o_q, b_second, mask=m_q)
    m_k, m_v = (o_h >= H) & (o_h < H + HKV), (o_h >= H + HKV) & (o_h < H + 2 * HKV)
    o_kv = tl.where(m_k, o_h - H, o_h - H - HKV)
    if QUANTIZED:
        b_scale = scale_of(tl.max(tl.maximum(tl.abs(b_first), tl.abs(b_second)), axis=1)[:, None])
        b_first, b_second = to_levels(b_first, b_scale), to_levels(b_second, b_scale)
        o_scale = i_slot * stride_sb + o_kv * stride_sh + i_position
        m_scale = o_h < tl.where(b_half > 0, H + 2 * HKV, 0)
        tl.store(k_scales_ptr + o_scale, b_scale, mask=m_k & m_scale)
        tl.store(v_scales_ptr + o_scale, b_scale, mask=m_v & m_scale)
    o_cache = i_slot * stride_cb + o_kv * stride_ch + i_position * stride_cs + o_half
    tl.store(k_ptr + o_cache, b_first, mask=m_half & m_k)
    tl.store(k_ptr + HALF + o_cache, b_second, mask=m_half & m_k)
    tl.store(v_ptr + o_cache, b_first, mask=m_half & m_v)
    tl.store(v_ptr + HALF + o_cache, b_second, mask=m_half & m_v)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates x [..., T, H, Dh] by table [2, ..., T, Dh / 2].

    table: the rows of `rope_table` for the T positions.
    """
    if not use_triton(x):
        return rope_ref(x, table)
    *lead, new, heads, head_dim = x.shape
    if tuple(table.shape[-2:]) != (new, head_dim // 2):
        raise ValueError(
            f"a table {list(table.shape)} does not rotate {list(x.shape)}: pass the rows of its "
            "positions"
        )
    rows = x.flatten(0, -4) if lead else x[None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    angles = table if table.ndim == 3 else table.expand(2, *lead, -1, -1)
    cos, sin = (part.contiguous() for part in angles)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        blocks = _blocks(head_dim)
        rope_kernel[(len(rows) * new, -(-heads // blocks["BLOCK_H"]))](
            x_ptr=rows,
            cos_ptr=cos,
            sin_ptr=sin,
            y_ptr=y,
            stride_xn=rows.stride(0),
            stride_xt=rows.stride(1),
            stride_xh=rows.stride(2),
            T_TABLE=0 if table.ndim == 3 else new,
            T=new,
            H=heads,
            **blocks,
            num_warps=WARPS,
        )
    return y


def rope_append(
    qkv: Tensor, table: Tensor, cache: LayerKV, slots: Tensor, starts: Tensor, heads: int
) -> Tensor:
    """Rotates q and k of qkv [R, T, (heads + 2 Hkv) Dh] and appends k and v to the cache.

    Returns q [R, heads, T, Dh].

    Args:
        table: [2, P, Dh / 2], all rows of `rope_table`.
        slots, starts: int64 [R]; no slot occurs twice, and every starts[r] + T must be within P and
            the cache's S (the kernel skips positions that are not).
    """
    cache.check_append(qkv, table, slots, starts, heads)
    if not use_triton(qkv):
        return rope_append_ref(qkv, table, cache, slots, starts, heads)
    rows, new, _ = qkv.shape
    kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    q = torch.empty(rows, heads, new, head_dim, dtype=qkv.dtype, device=qkv.device)
    blocks = _blocks(head_dim)
    rope_append_kernel[(rows * new, -(-(heads + 2 * kv_heads) // blocks["BLOCK_H"]))](
        **cache.append_arguments(qkv, table, slots, starts),
        q_ptr=q,
        stride_xt=qkv.stride(1),
        T=new,
        H=heads,
        HKV=kv_heads,
        **blocks,
        num_warps=WARPS,
    )
    return q


def rope_bytes(positions: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that must move: activations in and out, angles in.

    For rope_append, heads = H + 2 Hkv.
    """
    return positions * head_dim * (2 * heads * itemsize + 4)


def _blocks(head_dim: int) -> dict[str, int]:
    """512 values of either half of some heads."""
    half_block = next_power_of_2(head_dim // 2)
    head_block = max(1, 512 // half_block)
    return {"HALF": head_dim // 2, "BLOCK_HALF": half_block, "BLOCK_H": head_block}


def compile_cases() -> Iterator[Case]:
    """Head widths 16 (small transformers, vocoder), 64 (codec), 128 (backbone)."""
    for head_dim in (16, 64):
        yield Case(
            f"rope Dh={head_dim}",
            rope_kernel,
            pointers(bf16="x y", fp32="cos sin"),
            _blocks(head_dim),
            WARPS,
            wide_loads=True,
            unaligned=("T", "H", "T_TABLE"),
        )
    for head_dim, quantized in ((16, False), (128, False), (128, True)):
        yield Case(
            f"rope_append Dh={head_dim}" + " int8" * quantized,
            rope_append_kernel,
            append_signature("bf16", quantized) | pointers(bf16="q"),
            _blocks(head_dim) | {"QUANTIZED": quantized},
            WARPS,
            wide_loads=True,
            unaligned=("T", *APPEND_UNALIGNED),
        )
