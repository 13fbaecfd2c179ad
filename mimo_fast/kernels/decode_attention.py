"""One step of cached self-attention: rotate the projection, append to the cache, attend.

    q, k, v = heads of qkv[r];  q and k are rotated at position p = starts[r];
    k, v -> position p of slot slots[r]
    y[r, h] = sum_j softmax_j(q[h] . k[j] / sqrt(Dh)) v[j],   j = 0 ... p of that slot,
              with key/value head h // (H / Hkv)

Shapes: qkv [R, 1, (H + 2 Hkv) Dh], the table of all positions [2, P, Dh / 2], a `LayerKV` of S
positions, y [R, 1, H Dh]. Rotation, scores, softmax and sums are float32. The new key and value are
rounded to the cache's format before they are attended to. The scales of int8 keys are applied to
the scores, those of int8 values to the softmax weights. y is rounded once; with 16-bit inputs
`split_attention_kernel` also rounds the rotated q and the softmax weights.

slots and starts are read on the device, so one captured graph serves every position. A row whose
position lies outside the cache or the table writes 0 to y and nothing to the cache: one replay too
many must not write into the next slot. The new key and value do not pass through memory: the
program that stores them starts its sum with them.

S <= 16 (the 11 positions of the patch decoder, 64 heads x 16): `small_decode_kernel` computes a few
heads a program with one warp for every 512 key elements, all in registers. At this size every
kernel costs its launch.

Longer caches: `split_attention_kernel`, split-KV. A program holds all H / Hkv query heads of one
key/value head, so a key is read once, and one of SPLITS equal parts of the row's length, in blocks
of 32 keys of which two are in flight. SPLITS depends only on the greatest length, so a row's result
does not depend on the other rows. `merge_splits_kernel` combines the parts in order where there are
several. Bytes: 2 p Hkv Dh of cache (int8: 2 p Hkv (Dh + 4)), and 8 SPLITS H Dh of float32 partials
(6% of it at 8192).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import e as EULER
from math import log2, sqrt
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.attention import SMALL, attention, small_block, small_warps
from mimo_fast.kernels.cpu import library as native
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
from mimo_fast.kernels.kv_cache import (
    APPEND_UNALIGNED,
    LayerKV,
    append_signature,
    scale_of,
    to_levels,
)
from mimo_fast.kernels.rope import load_angles, load_rotated, rope_append_ref

SPLITS = ((64, 1), (256, 4), (1024, 16))
"""(largest length, splits); 64 beyond."""

BLOCK_S = 32


def decode_attention_ref(
    qkv: Tensor, table: Tensor, cache: LayerKV, slots: Tensor, starts: Tensor, heads: int
) -> Tensor:
    y = qkv.new_zeros(len(qkv), 1, heads * cache.k.shape[3])
    for r, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        if 0 <= start < min(table.shape[1], cache.capacity):
            row = slice(r, r + 1)
            q = rope_append_ref(qkv[row], table, cache, slots[row], starts[row], heads)
            seen = cache.read(slot, start + 1, qkv.dtype)
            y[r] = attention(q, *seen, causal=False).transpose(1, 2).flatten(2)
    return y


@jit
def row_length(starts_ptr, i_row, LIMIT):
    """Positions that a row attends to, including its new one; 0 where it has no position."""
    i_start = tl.load(starts_ptr + i_row)
    return tl.where((i_start >= 0) & (i_start < LIMIT), i_start + 1, 0).to(tl.int32)


@jit
def small_decode_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    y_ptr,
    slots_ptr,
    starts_ptr,
    stride_xr,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_sb,
    stride_sh,
    LIMIT,
    H,
    HKV,
    scale,
    DH: tl.constexpr,
    SHARE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    if not FIXED:
        pdl_wait(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    i_slot, length = tl.load(slots_ptr + i_row).to(tl.int64), row_length(starts_ptr, i_row, LIMIT)
    position = length - 1
    o_h, o_s = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_S)
    o_d, o_kv = tl.arange(0, BLOCK_D)[None, :], o_h // SHARE
    m_h = (o_h < H)[:, None]
    m_d = o_d < tl.where(length > 0, DH, 0)
    b_cos, b_sin = load_angles(cos_ptr, sin_ptr, position, o_d, m_d, DH // 2)
    if FIXED:
        pdl_wait(PDL)
    # Not masked by the length, so these reads do not wait for it.
    m_x = m_h & (o_d < DH)
    qkv_ptr += i_row * stride_xr
    b_q = load_rotated(qkv_ptr, o_h[:, None] * DH, o_d, m_x, b_cos, b_sin, DH // 2) * scale
    b_k_new = load_rotated(qkv_ptr, (H + o_kv)[:, None] * DH, o_d, m_x, b_cos, b_sin, DH // 2)
    b_v_new = load_float(qkv_ptr + (H + HKV + o_kv)[:, None] * DH + o_d, m_x)

    o_cache = i_slot * stride_cb + o_kv[:, None] * stride_ch
    # Of the heads that share a key/value head, the first stores it.
    m_new = m_h & (o_h % SHARE == 0)[:, None] & m_d
    if QUANTIZED:
        b_k_scale = scale_of(tl.max(tl.abs(b_k_new), axis=1))
        b_v_scale = scale_of(tl.max(tl.abs(b_v_new), axis=1))
        b_k_new = to_levels(b_k_new, b_k_scale[:, None])
        b_v_new = to_levels(b_v_new, b_v_scale[:, None])
        o_scale = i_slot * stride_sb + o_kv * stride_sh
        m_scale = (o_h < tl.where(length > 0, H, 0)) & (o_h % SHARE == 0)
        tl.store(k_scales_ptr + o_scale + position, b_k_scale, mask=m_scale)
        tl.store(v_scales_ptr + o_scale + position, b_v_scale, mask=m_scale)
    b_k_new, b_v_new = b_k_new.to(k_ptr.dtype.element_ty), b_v_new.to(v_ptr.dtype.element_ty)
    tl.store(k_ptr + o_cache + position * stride_cs + o_d, b_k_new, mask=m_new)
    tl.store(v_ptr + o_cache + position * stride_cs + o_d, b_v_new, mask=m_new)

    o_past = o_cache[:, :, None] + o_s[None, :, None] * stride_cs + o_d[:, None, :]
    m_past = m_h[:, :, None] & m_d[:, None, :] & (o_s < position)[None, :, None]
    b_k = tl.load(k_ptr + o_past, mask=m_past, other=0.0)
    b_v = tl.load(v_ptr + o_past, mask=m_past, other=0.0)
    m_last = (o_s == position)[None, :, None]
    b_k = tl.where(m_last, b_k_new[:, None, :], b_k).to(tl.float32)
    b_v = tl.where(m_last, b_v_new[:, None, :], b_v).to(tl.float32)
    b_scores = tl.sum(b_k * b_q[:, None, :], axis=2)
    if QUANTIZED:
        o_scales, m_scales = o_scale[:, None] + o_s[None, :], m_h & (o_s < position)[None, :]
        b_k_scales = tl.load(k_scales_ptr + o_scales, mask=m_scales, other=0.0)
        b_scores *= tl.where((o_s == position)[None, :], b_k_scale[:, None], b_k_scales)
    b_scores = tl.where((o_s < length)[None, :], b_scores, -float("inf"))
    b_max = tl.max(b_scores, axis=1)
    b_p = tl.exp2(b_scores - tl.where(b_max == -float("inf"), 0.0, b_max)[:, None])
    b_sum = tl.sum(b_p, axis=1)
    if QUANTIZED:
        b_v_scales = tl.load(v_scales_ptr + o_scales, mask=m_scales, other=0.0)
        b_p *= tl.where((o_s == position)[None, :], b_v_scale[:, None], b_v_scales)
    b_y = tl.sum(b_p[:, :, None] * b_v, axis=1) / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    pdl_trigger_last(PDL)
    o_y = (i_row * H + o_h)[:, None] * DH + o_d
    tl.store(y_ptr + o_y, b_y, mask=m_h & (o_d < DH))


@jit
def split_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    y_ptr,
    part_ptr,
    stats_ptr,
    slots_ptr,
    starts_ptr,
    stride_xr,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_sb,
    stride_sh,
    LIMIT,
    H,
    HKV,
    scale,
    DH: tl.constexpr,
    SHARE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_split, i_kv, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_slot, length = tl.load(slots_ptr + i_row).to(tl.int64), row_length(starts_ptr, i_row, LIMIT)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    first = i_split * part
    position = length - 1
    owner = (first < length) & (first + part >= length)
    o_g, o_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    o_h = i_kv * SHARE + o_g
    m_d = o_d < DH
    m_q = (o_g < SHARE)[:, None] & m_d[None, :]
    m_new = o_d < tl.where(owner, DH, 0)
    m_angle = o_d < tl.where(length > 0, DH, 0)
    b_cos, b_sin = load_angles(cos_ptr, sin_ptr, position, o_d, m_angle, DH // 2)
    qkv_ptr += i_row * stride_xr
    b_q = load_rotated(
        qkv_ptr, o_h[:, None] * DH, o_d[None, :], m_q, b_cos[None, :], b_sin[None, :], DH // 2
    )
    b_q = b_q.to(qkv_ptr.dtype.element_ty)
    # In every program, so these reads do not wait for the length.
    b_k_new = load_rotated(qkv_ptr, (H + i_kv) * DH, o_d, m_d, b_cos, b_sin, DH // 2)
    b_v_new = load_float(qkv_ptr + (H + HKV + i_kv) * DH + o_d, m_d)
    b_v_new = tl.where(owner, b_v_new, 0.0)

    head = i_slot * stride_cb + i_kv.to(tl.int64) * stride_ch
    head_scale = i_slot * stride_sb + i_kv.to(tl.int64) * stride_sh
    b_k_scale, b_v_scale = 1.0, 1.0
    if QUANTIZED:
        b_k_scale = scale_of(tl.max(tl.abs(b_k_new), axis=0))
        b_v_scale = scale_of(tl.max(tl.abs(b_v_new), axis=0))
        b_k_new, b_v_new = to_levels(b_k_new, b_k_scale), to_levels(b_v_new, b_v_scale)
        tl.store(k_scales_ptr + head_scale + position, b_k_scale, mask=owner)
        tl.store(v_scales_ptr + head_scale + position, b_v_scale, mask=owner)
    b_k_new, b_v_new = b_k_new.to(k_ptr.dtype.element_ty), b_v_new.to(v_ptr.dtype.element_ty)
    tl.store(k_ptr + head + position * stride_cs + o_d, b_k_new, mask=m_new)
    tl.store(v_ptr + head + position * stride_cs + o_d, b_v_new, mask=m_new)
    b_score = tl.sum(b_q.to(tl.float32) * b_k_new.to(tl.float32)[None, :], axis=1) * (
        b_k_scale * scale
    )
    b_max = tl.where(owner, b_score, -float("inf"))
    b_sum = tl.where(owner, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)
    b_y = tl.zeros([BLOCK_G, BLOCK_D], tl.float32) + (b_v_new.to(tl.float32) * b_v_scale)[None, :]

    last = tl.minimum(first + part, position)
    for start in range(first, last, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < last
        o_cache = head + o_s[:, None] * stride_cs + o_d[None, :]
        b_k = tl.load(k_ptr + o_cache, mask=m_s[:, None] & m_d[None, :], other=0).to(b_q.dtype)
        b_v = tl.load(v_ptr + o_cache, mask=m_s[:, None] & m_d[None, :], other=0).to(b_q.dtype)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if QUANTIZED:
            b_scores *= tl.load(k_scales_ptr + head_scale + o_s, mask=m_s, other=0.0)[None, :]
        b_scores = tl.where(m_s[None, :], b_scores, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_p = tl.exp2(b_scores - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        if QUANTIZED:
            b_p *= tl.load(v_scales_ptr + head_scale + o_s, mask=m_s, other=0.0)[None, :]
        b_y = b_y * b_decay[:, None] + tl.dot(b_p.to(b_q.dtype), b_v, input_precision="ieee")
        b_max = b_new
    pdl_trigger_last(PDL)
    o_row = i_row * H + o_h
    if SPLITS == 1:
        b_y = b_y / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        tl.store(y_ptr + o_row[:, None] * DH + o_d[None, :], b_y, mask=m_q)
    elif first < length:
        o_part = o_row * SPLITS + i_split
        tl.store(part_ptr + o_part[:, None] * DH + o_d[None, :], b_y, mask=m_q)
        tl.store(stats_ptr + o_part * 2, b_max, mask=o_g < SHARE)
        tl.store(stats_ptr + o_part * 2 + 1, b_sum, mask=o_g < SHARE)


@jit
def merge_splits_kernel(
    part_ptr,
    stats_ptr,
    y_ptr,
    starts_ptr,
    LIMIT,
    H,
    DH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_head, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = row_length(starts_ptr, i_row, LIMIT)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    o_split, o_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    m_split = o_split * part < length
    m_d = o_d < DH
    o_part = (i_row * H + i_head) * SPLITS + o_split
    b_max = tl.load(stats_ptr + o_part * 2, mask=m_split, other=-float("inf"))
    b_sum = tl.load(stats_ptr + o_part * 2 + 1, mask=m_split, other=0.0)
    o_y = o_part[:, None] * DH + o_d[None, :]
    b_y = tl.load(part_ptr + o_y, mask=m_split[:, None] & m_d[None, :], other=0.0)
    b_top = tl.max(b_max, axis=0)
    b_weight = tl.exp2(b_max - tl.where(b_top == -float("inf"), 0.0, b_top))
    b_total = tl.sum(b_weight * b_sum, axis=0)
    b_y = tl.sum(b_weight[:, None] * b_y, axis=0) / tl.where(b_total > 0, b_total, 1.0)
    pdl_trigger_last(PDL)
    tl.store(y_ptr + (i_row * H + i_head) * DH + o_d, b_y, mask=m_d)


def decode_attention(
    qkv: Tensor,
    table: Tensor,
    cache: LayerKV,
    slots: Tensor,
    starts: Tensor,
    heads: int,
    max_length: int,
    fixed: bool = False,
) -> Tensor:
    """qkv [R, 1, (heads + 2 Hkv) Dh] -> [R, 1, heads Dh].

    Row r appends to position starts[r] of slot slots[r].

    Args:
        table: [2, P, Dh / 2], all rows of `rope_table`.
        slots, starts: int64 [R]; no slot occurs twice.
        max_length: no row attends to more positions. It determines how the work is split, and so
            the rounding: pass the same value at every step of a run.
        fixed: slots and starts were complete before the run's first kernel was launched and do not
            change in it. They may then be read before the PDL wait (dispatch.py); kernels for
            caches of at most SMALL positions do so.
    """
    cache.check_append(qkv, table, slots, starts, heads)
    if qkv.shape[1] != 1 or heads % cache.k.shape[1]:
        raise ValueError(
            f"qkv {list(qkv.shape)} must be of one position a row, its {heads} heads "
            "in equal shares for the key/value heads"
        )
    if not use_triton(qkv):
        takes = native.takes_attention(qkv, cache)
        plain = native.decode_attention if takes else decode_attention_ref
        return plain(qkv, table, cache, slots, starts, heads)
    rows, kv_heads, dh = len(qkv), cache.k.shape[1], cache.k.shape[3]
    share = heads // kv_heads
    y = torch.empty(rows, 1, heads * dh, dtype=qkv.dtype, device=qkv.device)
    arguments = cache.append_arguments(qkv, table, slots, starts)
    arguments |= {"y_ptr": y, "H": heads, "HKV": kv_heads, "scale": log2(EULER) / sqrt(dh)}
    arguments |= {"DH": dh, "SHARE": share}
    if cache.capacity <= SMALL:
        block = small_block(heads, cache.capacity, dh)
        small_decode_kernel[(rows, -(-heads // block["BLOCK_H"]))](
            **early_launch(qkv, "small_decode"),
            **arguments,
            **block,
            FIXED=fixed,
            num_warps=small_warps(block),
        )
        return y
    splits = next((count for limit, count in SPLITS if max_length <= limit), 64)
    part, stats = (
        y
        if splits == 1
        else torch.empty(rows, heads, splits, width, device=qkv.device, dtype=torch.float32)
        for width in (dh, 2)
    )
    parts = {"part_ptr": part, "stats_ptr": stats, "SPLITS": splits, "BLOCK_S": BLOCK_S}
    parts["BLOCK_D"] = max(16, next_power_of_2(dh))
    split_attention_kernel[(splits, kv_heads, rows)](
        **early_launch(qkv, "split_attention"),
        **arguments,
        **parts,
        BLOCK_G=max(16, next_power_of_2(share)),
        num_warps=2 * qkv.element_size(),
        num_stages=3,
    )
    if splits > 1:
        merge_splits_kernel[(heads, rows)](
            **early_launch(qkv, "merge_splits"),
            **{name: arguments[name] for name in ("y_ptr", "starts_ptr", "LIMIT", "H", "DH")},
            **parts,
            num_warps=4,
        )
    return y


def decode_attention_bytes(
    lengths: Sequence[int], kv_heads: int, dh: int, itemsize: int, quantized: bool
) -> int:
    """Bytes that must move: the keys and values of each row's length, with their scales."""
    return 2 * sum(lengths) * kv_heads * (dh + 4 if quantized else dh * itemsize)


def compile_cases() -> Iterator[Case]:
    """Patch decoder (64 heads x 16), backbone (32/8 x 128) in every split; float32, int8 caches."""
    parts = pointers(fp32="part stats")
    split = {"DH": 128, "BLOCK_S": BLOCK_S, "BLOCK_D": 128}
    for dtype, quantized in (("bf16", False), ("fp32", False), ("bf16", True)):
        name, block = dtype + " int8" * quantized, small_block(64, 11, 16)
        signature = append_signature(dtype, quantized) | pointers(**{dtype: "y"})
        signature["scale"] = "fp32"
        common: dict[str, Any] = {"wide_loads": True, "unaligned": APPEND_UNALIGNED}
        common["ieee"] = dtype == "fp32"
        yield Case(
            f"small_decode {name}",
            small_decode_kernel,
            signature,
            {"DH": 16, "SHARE": 1, "QUANTIZED": quantized, "FIXED": True} | block,
            small_warps(block),
            **common,
        )
        for splits in (1, 4, 16, 64) if dtype == "bf16" else (64,):
            yield Case(
                f"split_attention {name} splits={splits}",
                split_attention_kernel,
                signature | parts,
                split | {"SHARE": 4, "QUANTIZED": quantized, "BLOCK_G": 16, "SPLITS": splits},
                8 if dtype == "fp32" else 4,
                3,
                **common,
            )
    for splits in (4, 16, 64):
        yield Case(
            f"merge_splits splits={splits}",
            merge_splits_kernel,
            parts | pointers(bf16="y", i64="starts"),
            split | {"SPLITS": splits},
            4,
            wide_loads=True,
            unaligned=("LIMIT", "H"),
        )
