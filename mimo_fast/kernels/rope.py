"""Rotary position embedding, half-split ("rotate half") form, as in Qwen2; alone, or with the append to the KV cache.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  angle = position / theta^(2 i / Dh)

where x1 and x2 are the halves of a head. Angles, cosines and the rotation are float32 whatever the activations are;
y is rounded once, to x's dtype.

    rope:         x [..., T, H, Dh] (any strides but the last), table [2, ..., T, Dh / 2] of its positions -> y
    rope_append:  qkv [R, T, (H + 2 Hkv) Dh], the table of all positions [2, P, Dh / 2]. Row r holds positions
                  starts[r] ... starts[r] + T - 1 of cache slot slots[r]: q and k are rotated there, k and v written
                  to k_cache and v_cache [B, Hkv, S, Dh] (any strides but the last), q returned as [R, H, T, Dh].

slots and starts are read on the device, so that a captured graph may be replayed at the next position. Nothing is
written for a position that the cache or the table does not have: a replay too many must not reach the next slot.

A program turns about 1024 values, some heads of one position: each thread 8 of either half, 16-byte loads in 16-bit
types. All heads of a position share Dh / 2 angles, which come from L1. Bytes: rope N T H Dh (1 read + 1 write);
rope_append R T (H + 2 Hkv) Dh (1 + 1); and 4 Dh a position of angles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import Case, jit, next_power_of_2, tl, use_triton

WARPS = 2


def rope_table(head_dim: int, theta: float, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """cos and sin of every position: [2, positions, head_dim / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    angles = torch.outer(torch.arange(positions, device=device).float(), 1.0 / theta**exponents)
    return torch.stack((angles.cos(), angles.sin()))


def rope_ref(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_append_ref(
    qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, starts: Tensor, heads: int
) -> Tensor:
    new, kv_heads = qkv.shape[1], k_cache.shape[1]
    q, k, v = qkv.unflatten(-1, (-1, k_cache.shape[-1])).split((heads, kv_heads, kv_heads), dim=2)
    turned = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    for row, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        angles = table[:, start : start + new]
        turned[row] = rope_ref(q[row], angles).transpose(0, 1)
        k_cache[slot, :, start : start + new] = rope_ref(k[row], angles).transpose(0, 1)
        v_cache[slot, :, start : start + new] = v[row].transpose(0, 1)
    return turned


@jit
def turn(b_first, b_second, b_cos, b_sin):
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_xn, stride_xt, stride_xh, T_TABLE, T, H,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
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
    b_first = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_second = tl.load(x_ptr + HALF + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_first, b_second = turn(b_first, b_second, b_cos, b_sin)
    y_ptr += i_row * H * 2 * HALF
    o_y = o_h[:, None] * 2 * HALF + o_half[None, :]
    tl.store(y_ptr + o_y, b_first.to(y_ptr.dtype.element_ty), mask=m_x)
    tl.store(y_ptr + HALF + o_y, b_second.to(y_ptr.dtype.element_ty), mask=m_x)


@jit
def rope_append_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, slots_ptr, starts_ptr,
    stride_xr, stride_xt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, T, P, S,
    H, HKV, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_r, i_t = i_row // T, i_row % T
    i_slot = tl.load(slots_ptr + i_r).to(tl.int64)
    i_position = tl.load(starts_ptr + i_r).to(tl.int64) + i_t
    b_half = tl.where((i_position >= 0) & (i_position < tl.minimum(P, S)), HALF, 0)
    o_half = tl.arange(0, BLOCK_HALF)[None, :]
    o_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    m_half = o_half < b_half
    m_x = m_half & (o_h < H + 2 * HKV)
    b_cos = tl.load(cos_ptr + i_position * HALF + o_half, mask=m_half, other=0.0)
    b_sin = tl.load(sin_ptr + i_position * HALF + o_half, mask=m_half, other=0.0)
    qkv_ptr += i_r * stride_xr + i_t * stride_xt
    o_x = o_h * 2 * HALF + o_half
    b_first = tl.load(qkv_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_second = tl.load(qkv_ptr + HALF + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_turned_first, b_turned_second = turn(b_first, b_second, b_cos, b_sin)

    m_q = m_x & (o_h < H)
    o_q = (i_r * H + o_h) * T * 2 * HALF + i_t * 2 * HALF + o_half
    tl.store(q_ptr + o_q, b_turned_first.to(q_ptr.dtype.element_ty), mask=m_q)
    tl.store(q_ptr + HALF + o_q, b_turned_second.to(q_ptr.dtype.element_ty), mask=m_q)
    m_k = m_x & (o_h >= H) & (o_h < H + HKV)
    o_k = i_slot * stride_kb + (o_h - H) * stride_kh + i_position * stride_ks + o_half
    tl.store(k_ptr + o_k, b_turned_first.to(k_ptr.dtype.element_ty), mask=m_k)
    tl.store(k_ptr + HALF + o_k, b_turned_second.to(k_ptr.dtype.element_ty), mask=m_k)
    m_v = m_x & (o_h >= H + HKV)
    o_v = i_slot * stride_vb + (o_h - H - HKV) * stride_vh + i_position * stride_vs + o_half
    tl.store(v_ptr + o_v, b_first.to(v_ptr.dtype.element_ty), mask=m_v)
    tl.store(v_ptr + HALF + o_v, b_second.to(v_ptr.dtype.element_ty), mask=m_v)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates x [..., T, H, Dh] by table [2, ..., T, Dh / 2], the rows of `rope_table` for its T positions."""
    if not use_triton(x):
        return rope_ref(x, table)
    *lead, new, heads, head_dim = x.shape
    if tuple(table.shape[-2:]) != (new, head_dim // 2):
        raise ValueError(f"a table {list(table.shape)} does not turn {list(x.shape)}; pass the rows of its positions")
    rows = x.flatten(0, -4) if lead else x[None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    angles = table if table.ndim == 3 else table.expand(2, *lead, -1, -1)
    cos, sin = (part.contiguous() for part in angles)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        half_block, head_block = _tile(head_dim)
        rope_kernel[(len(rows) * new, -(-heads // head_block))](
            x_ptr=rows, cos_ptr=cos, sin_ptr=sin, y_ptr=y, stride_xn=rows.stride(0),
            stride_xt=rows.stride(1), stride_xh=rows.stride(2), T_TABLE=0 if table.ndim == 3 else new, T=new, H=heads,
            HALF=head_dim // 2, BLOCK_HALF=half_block, BLOCK_H=head_block, num_warps=WARPS,
        )
    return y


def rope_append(
    qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, starts: Tensor, heads: int
) -> Tensor:
    """Rotates q and k of qkv [R, T, (heads + 2 Hkv) Dh], appends k and v to the cache, returns q [R, heads, T, Dh].

    table [2, P, Dh / 2]: all rows of `rope_table`. k_cache, v_cache [B, Hkv, S, Dh]. slots, starts int64 [R], the slots
    different; every starts[r] + T must be within P and S (the kernel leaves out positions that are not).
    """
    rows, new, width = qkv.shape
    kv_heads, capacity, head_dim = k_cache.shape[1:]
    if width != (heads + 2 * kv_heads) * head_dim or k_cache.shape != v_cache.shape:
        raise ValueError(f"qkv of width {width} is not {heads} + 2 x {kv_heads} heads of {head_dim}")
    if table.shape[-1] * 2 != head_dim or len(slots) != rows or len(starts) != rows:
        raise ValueError(f"rope_append of {rows} rows needs as many slots and starts, and {head_dim // 2} angles")
    if not use_triton(qkv):
        return rope_append_ref(qkv, table, k_cache, v_cache, slots, starts, heads)
    if any(x.stride(-1) != 1 for x in (qkv, k_cache, v_cache, slots, starts)) or not table.is_contiguous():
        raise ValueError("rope_append needs a contiguous table and contiguous last dimensions")
    q = torch.empty(rows, heads, new, head_dim, dtype=qkv.dtype, device=qkv.device)
    half_block, head_block = _tile(head_dim)
    rope_append_kernel[(rows * new, -(-(heads + 2 * kv_heads) // head_block))](
        qkv_ptr=qkv, cos_ptr=table[0], sin_ptr=table[1], q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, slots_ptr=slots,
        starts_ptr=starts, stride_xr=qkv.stride(0), stride_xt=qkv.stride(1),
        stride_kb=k_cache.stride(0), stride_kh=k_cache.stride(1), stride_ks=k_cache.stride(2),
        stride_vb=v_cache.stride(0), stride_vh=v_cache.stride(1), stride_vs=v_cache.stride(2), T=new,
        P=table.shape[1], S=capacity, H=heads, HKV=kv_heads, HALF=head_dim // 2, BLOCK_HALF=half_block,
        BLOCK_H=head_block, num_warps=WARPS,
    )
    return q


def rope_bytes(positions: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that must move, of rope or (heads = H + 2 Hkv) rope_append: activations in and out, angles in."""
    return positions * head_dim * (2 * heads * itemsize + 4)


def _tile(head_dim: int) -> tuple[int, int]:
    """(BLOCK_HALF, BLOCK_H): 512 values of either half."""
    half_block = next_power_of_2(head_dim // 2)
    return half_block, max(1, 512 // half_block)


def compile_cases() -> Iterator[Case]:
    """Head widths 16 (small transformers, vocoder), 64 (codec) and 128 (backbone); any number of heads."""
    signature = {f"{name}_ptr": "*bf16" for name in "xy"} | {f"{name}_ptr": "*fp32" for name in ("cos", "sin")}
    signature |= dict.fromkeys(("stride_xn", "stride_xt", "stride_xh", "T_TABLE", "T", "H"), "i32")
    for head_dim in (16, 64):
        half_block, head_block = _tile(head_dim)
        constexprs = {"HALF": head_dim // 2, "BLOCK_HALF": half_block, "BLOCK_H": head_block}
        yield Case(
            f"rope Dh={head_dim}", rope_kernel, signature, constexprs, WARPS,
            wide_loads=True, unaligned=("T", "H", "T_TABLE"),
        )
    signature = {f"{name}_ptr": "*bf16" for name in ("qkv", "q", "k", "v")}
    signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "slots_ptr": "*i64", "starts_ptr": "*i64"}
    strides = ("xr", "xt", "kb", "kh", "ks", "vb", "vh", "vs")
    signature |= dict.fromkeys((*(f"stride_{name}" for name in strides), "T", "P", "S", "H", "HKV"), "i32")
    for head_dim in (16, 128):
        half_block, head_block = _tile(head_dim)
        constexprs = {"HALF": head_dim // 2, "BLOCK_HALF": half_block, "BLOCK_H": head_block}
        yield Case(
            f"rope_append Dh={head_dim}", rope_append_kernel, signature, constexprs, WARPS,
            wide_loads=True, unaligned=("T", "P", "S", "H", "HKV"),
        )
