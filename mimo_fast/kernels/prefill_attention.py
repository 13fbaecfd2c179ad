"""Attention of the new positions of one or several prompts, each over its slot of the cache.

    y[t, h] = sum_j softmax_j(q[t, h] . k[j] / sqrt(Dh)) v[j],   j = 0 ... positions[t] of that slot

with key/value head h // (H / Hkv). The keys and values of the new positions are in the cache
already (`rope_append`). Positions are read on the device, so a captured graph serves all of them.

Shapes: q [N, T, H, Dh], rotated; a `LayerKV` of S positions; slots, positions int64 [N, T];
y [N, T, H Dh]. All rows of a prompt n belong to slot slots[n, 0] and their positions ascend by one.
Rows that only pad a captured graph come last and have a position outside the cache, such as -1:
nothing is read for them, and y is 0. A prompt has the same bits whatever comes with it. Scores,
softmax and sums are float32; with 16-bit inputs the softmax weights are rounded to that type. The
scales of int8 keys are applied to the scores, those of int8 values to the softmax weights. y is
rounded once.

Flash attention, one pass. A program holds BLOCK_T positions with all H / Hkv query heads of one
key/value head, so a key is read once for all of them, and loops over the keys from 0 on in blocks
of BLOCK_S. The order of a row's sums depends only on its position and BLOCK_S: a block that a row
does not see multiplies its sums by 1 and adds 0. Tiles shrink with T (`tile`): for the published
backbone (32/8 heads) 32 positions are 64 programs, 64 to 256 are 128, for 132 SMs of an H100; 512
are 256. Tiles that attend to the most keys start first. Keys that several tiles read come from L2:
1 MB at 254 positions. Bytes: 2 (start + T) Hkv Dh of cache (int8: 2 (start + T) Hkv (Dh + 4)), q in
and y out.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import e as EULER
from math import log2, sqrt

import torch
from torch import Tensor

from mimo_fast.kernels.attention import attention
from mimo_fast.kernels.dispatch import (
    SPILLS,
    Case,
    jit,
    next_power_of_2,
    pointers,
    tl,
    use_triton,
)
from mimo_fast.kernels.kv_cache import LayerKV, cache_signature

TILES = ((64, 16), (128, 32))
"""(largest T, query rows a program); 64 rows beyond. A row is one head of one position."""

BLOCK_S = 32
"""Keys a block; 64 of them spill registers in a tile of 64 rows."""


def prefill_attention_ref(q: Tensor, cache: LayerKV, slots: Tensor, positions: Tensor) -> Tensor:
    parts = zip(q, slots, positions, strict=True)
    return torch.stack([_one_ref(part, cache, *places) for part, *places in parts])


def _one_ref(q: Tensor, cache: LayerKV, slots: Tensor, positions: Tensor) -> Tensor:
    y = q.new_zeros(len(q), q.shape[1] * q.shape[2])
    real = int(((positions >= 0) & (positions < cache.capacity)).sum())
    if real:
        k, v = cache.read(int(slots[0]), int(positions[real - 1]) + 1, q.dtype)
        heads_first = attention(q[:real].transpose(0, 1)[None], k, v, causal=True)
        y[:real] = heads_first[0].transpose(0, 1).flatten(1)
    return y


@jit
def prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    y_ptr,
    slots_ptr,
    positions_ptr,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_sb,
    stride_sh,
    LIMIT,
    T,
    H,
    scale,
    DH: tl.constexpr,
    SHARE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_tile, i_kv = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_part = tl.program_id(2).to(tl.int64)
    positions_ptr += i_part * T
    slots_ptr += i_part * T
    q_ptr += i_part * T * H * DH
    y_ptr += i_part * T * H * DH
    o_row, o_d = tl.arange(0, BLOCK_T * BLOCK_G), tl.arange(0, BLOCK_D)
    o_t, o_g = i_tile * BLOCK_T + o_row // BLOCK_G, o_row % BLOCK_G
    m_d = (o_d < DH)[None, :]
    m_y = ((o_t < T) & (o_g < SHARE))[:, None] & m_d
    b_position = tl.load(positions_ptr + o_t, mask=o_t < T, other=-1)
    m_real = (b_position >= 0) & (b_position < LIMIT)
    b_position = tl.where(m_real, b_position, -1).to(tl.int32)
    length = tl.max(b_position, axis=0) + 1

    i_slot = tl.load(slots_ptr).to(tl.int64)
    head = i_slot * stride_cb + i_kv.to(tl.int64) * stride_ch
    head_scale = i_slot * stride_sb + i_kv.to(tl.int64) * stride_sh
    o_y = (o_t * H + i_kv * SHARE + o_g)[:, None] * DH + o_d[None, :]
    b_q = tl.load(q_ptr + o_y, mask=m_y & m_real[:, None], other=0.0)
    # A padding row sees no key, but its maximum must be finite.
    b_max = tl.where(m_real, -float("inf"), 0.0)
    b_sum = tl.zeros([BLOCK_T * BLOCK_G], tl.float32)
    b_y = tl.zeros([BLOCK_T * BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < length
        o_cache = head + o_s[:, None] * stride_cs + o_d[None, :]
        b_k = tl.load(k_ptr + o_cache, mask=m_s[:, None] & m_d, other=0).to(b_q.dtype)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if QUANTIZED:
            b_scores *= tl.load(k_scales_ptr + head_scale + o_s, mask=m_s, other=0.0)[None, :]
        b_scores = tl.where(o_s[None, :] <= b_position[:, None], b_scores, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_p = tl.exp2(b_scores - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        if QUANTIZED:
            b_p *= tl.load(v_scales_ptr + head_scale + o_s, mask=m_s, other=0.0)[None, :]
        b_v = tl.load(v_ptr + o_cache, mask=m_s[:, None] & m_d, other=0).to(b_q.dtype)
        b_y = b_y * b_decay[:, None] + tl.dot(b_p.to(b_q.dtype), b_v, input_precision="ieee")
        b_max = b_new
    b_y = b_y / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    tl.store(y_ptr + o_y, b_y, mask=m_y)


def prefill_attention(q: Tensor, cache: LayerKV, slots: Tensor, positions: Tensor) -> Tensor:
    """q [N, T, H, Dh], slots and positions int64 [N, T] on the cache's device -> [N, T, H Dh].

    Raises:
        ValueError: they do not go together.
    """
    (parts, new, heads, dh), kv_heads = q.shape, cache.k.shape[1]
    fits = slots.shape == positions.shape == (parts, new)
    if dh != cache.k.shape[3] or heads % kv_heads or not fits:
        raise ValueError(
            f"queries {list(q.shape)} with slots {list(slots.shape)} and positions "
            f"{list(positions.shape)} do not go with a cache {list(cache.k.shape)}"
        )
    if cache.k_scales is None and cache.k.dtype != q.dtype:
        raise ValueError(f"queries are {q.dtype}, the keys {cache.k.dtype}")
    if not use_triton(q):
        return prefill_attention_ref(q, cache, slots, positions)
    if any(not x.is_contiguous() for x in (q, slots, positions)):
        raise ValueError("prefill_attention needs contiguous queries, slots and positions")
    k_scales, v_scales = (cache.k if x is None else x for x in (cache.k_scales, cache.v_scales))
    share = heads // kv_heads
    block, options = tile(new, share, dh, q.element_size(), cache.k_scales is not None)
    y = torch.empty(parts, new, heads * dh, dtype=q.dtype, device=q.device)
    prefill_attention_kernel[(-(-new // block["BLOCK_T"]), kv_heads, parts)](
        q_ptr=q,
        k_ptr=cache.k,
        v_ptr=cache.v,
        k_scales_ptr=k_scales,
        v_scales_ptr=v_scales,
        y_ptr=y,
        slots_ptr=slots,
        positions_ptr=positions,
        stride_cb=cache.k.stride(0),
        stride_ch=cache.k.stride(1),
        stride_cs=cache.k.stride(2),
        stride_sb=k_scales.stride(0),
        stride_sh=k_scales.stride(1),
        LIMIT=cache.capacity,
        T=new,
        H=heads,
        scale=log2(EULER) / sqrt(dh),
        DH=dh,
        SHARE=share,
        QUANTIZED=cache.k_scales is not None,
        **block,
        **options,
    )
    return y


def prefill_attention_bytes(
    new: int, start: int, heads: int, kv_heads: int, dh: int, itemsize: int, quantized: bool
) -> int:
    """Bytes that must move: the keys and values of all positions with their scales, q in, y out."""
    position = dh + 4 if quantized else dh * itemsize
    return 2 * (start + new) * kv_heads * position + 2 * new * heads * dh * itemsize


def tile(
    new: int, share: int, dh: int, itemsize: int, quantized: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes and launch options; float32 tiles are small, as they use no tensor cores."""
    wanted = next((rows for limit, rows in TILES if new <= limit), 64) if itemsize == 2 else 16
    block_g = next_power_of_2(share)
    rows = max(wanted, block_g)
    block = {
        "BLOCK_T": rows // block_g,
        "BLOCK_G": block_g,
        "BLOCK_S": BLOCK_S,
        "BLOCK_D": max(16, next_power_of_2(dh)),
    }
    warps, stages = (4, 3) if itemsize == 2 else (8, 2)
    if SPILLS and (quantized or itemsize != 2):
        stages = 1
    return block, {"num_warps": warps, "num_stages": stages}


def compile_cases() -> Iterator[Case]:
    """The published backbone (32/8 heads x 128) at every size of tile; float32 and int8 caches."""
    for dtype, quantized, sizes in (
        ("bf16", False, (32, 128, 512)),
        ("fp16", False, (512,)),
        ("fp32", False, (512,)),
        ("bf16", True, (32, 128, 512)),
    ):
        signature = cache_signature(dtype, quantized) | pointers(i64="slots positions")
        signature |= pointers(**{dtype: "q y"}) | {"scale": "fp32"}
        for new in sizes:
            block, options = tile(new, 4, 128, 4 if dtype == "fp32" else 2, quantized)
            yield Case(
                f"prefill_attention {dtype}{' int8' * quantized} T={new}",
                prefill_attention_kernel,
                signature,
                {"DH": 128, "SHARE": 4, "QUANTIZED": quantized} | block,
                options["num_warps"],
                options["num_stages"],
                ieee=dtype == "fp32",
                wide_loads=True,
                unaligned=("LIMIT", "T", "H", "stride_sb", "stride_sh"),
            )
