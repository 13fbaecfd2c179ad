"""Softmax attention over whole sequences, scale 1 / sqrt(Dh).

    attention         q, k and v as they are (prefill, codec): torch's scaled_dot_product_attention
                      on every device
    rotary_attention  takes the projection of a sequence that starts at position 0, and rotates q
                      and k first

`decode_attention` (one query a row over a cache) and `window_attention` (vocoder) have their own
files.

Shapes: attention takes q [N, H, T, Dh], k and v [N, Hkv, S, Dh], any strides but the last;
rotary_attention takes qkv [N, T, (H + 2 Hkv) Dh] and gives [N, T, H Dh]. Query head h reads
key/value head h // (H / Hkv).

T <= 16 (the 4-token patch encoder, 64 heads x 16): in `rotary_attention_kernel` a program computes
a few heads of one sequence, with one warp for every 512 key elements; keys and values stay in
registers while the program loops over the queries. All arithmetic is float32 and y is rounded once.
At this size every kernel costs its launch, so the rotation is part of this one. Bytes: qkv is read
once and y written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import e as EULER
from math import log2, sqrt

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
from mimo_fast.kernels.rope import load_angles, load_rotated, rope
from mimo_fast.kernels.sdpa import sdpa
from mimo_fast.kernels.window_attention import WINDOW_BLOCK, window_attention

__all__ = [
    "SMALL",
    "WINDOW_BLOCK",
    "attention",
    "rotary_attention",
    "rotary_attention_ref",
    "window_attention",
]

SMALL = 16
"""Largest number of positions whose keys and values are held in registers."""


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [N, H, T, Dh], k and v [N, Hkv, S, Dh] with S >= T -> [N, H, T, Dh].

    Causal: query t sees keys up to S - T + t, so that a cache may precede the queries.
    """
    t, s, gqa = q.shape[-2], k.shape[-2], q.shape[1] != k.shape[1]
    if not causal or t == 1:
        return sdpa(q, k, v, enable_gqa=gqa)
    if t == s:
        return sdpa(q, k, v, is_causal=True, enable_gqa=gqa)
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    return sdpa(q, k, v, attn_mask=visible, enable_gqa=gqa)


def attention_bytes(
    n: int, t: int, s: int, heads: int, kv_heads: int, dh: int, itemsize: int
) -> int:
    """Bytes that must move: q, k and v in, y out."""
    return 2 * n * (t * heads + s * kv_heads) * dh * itemsize


def rotary_attention_ref(
    qkv: Tensor, table: Tensor, heads: int, kv_heads: int, causal: bool
) -> Tensor:
    split = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
    angles = table[:, : qkv.shape[1]]
    q, k, v = (
        x.transpose(1, 2) for x in (rope(split[0], angles), rope(split[1], angles), split[2])
    )
    return attention(q, k, v, causal).transpose(1, 2).flatten(2)


@jit
def rotary_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    stride_xn,
    stride_xt,
    T,
    H,
    HKV,
    scale,
    DH: tl.constexpr,
    SHARE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    o_kv = (o_h // SHARE)[:, None, None] * DH
    m_d = (o_d < DH)[None, :]
    m_h = (o_h < H)[:, None] & m_d
    m_s = (o_s < T)[:, None] & m_d
    m_kv = m_h[:, None, :] & m_s[None, :, :]
    b_cos, b_sin = load_angles(cos_ptr, sin_ptr, o_s[:, None], o_d[None, :], m_s, DH // 2)
    pdl_wait(PDL)
    qkv_ptr += i_n * stride_xn
    o_k = H * DH + o_kv + o_s[None, :, None] * stride_xt
    b_k = load_rotated(
        qkv_ptr, o_k, o_d[None, None, :], m_kv, b_cos[None, :, :], b_sin[None, :, :], DH // 2
    )
    b_v = load_float(qkv_ptr + HKV * DH + o_k + o_d[None, None, :], m_kv)
    for i_t in range(T):
        b_q_cos, b_q_sin = load_angles(cos_ptr, sin_ptr, i_t, o_d[None, :], m_d, DH // 2)
        o_q = o_h[:, None] * DH + i_t * stride_xt
        b_q = load_rotated(qkv_ptr, o_q, o_d[None, :], m_h, b_q_cos, b_q_sin, DH // 2) * scale
        b_scores = tl.sum(b_k * b_q[:, None, :], axis=2)
        end = i_t + 1 if CAUSAL else T
        b_scores = tl.where((o_s < end)[None, :], b_scores, -float("inf"))
        b_p = tl.exp2(b_scores - tl.max(b_scores, axis=1)[:, None])
        b_y = tl.sum(b_p[:, :, None] * b_v, axis=1) / tl.sum(b_p, axis=1)[:, None]
        o_y = ((i_n * T + i_t) * H + o_h)[:, None] * DH + o_d[None, :]
        tl.store(y_ptr + o_y, b_y, mask=m_h)


def rotary_attention(qkv: Tensor, table: Tensor, heads: int, kv_heads: int, causal: bool) -> Tensor:
    """Self-attention of N sequences from position 0 on.

    qkv [N, T, (heads + 2 kv_heads) Dh] -> [N, T, heads Dh]. table [2, P, Dh / 2]: the rows of
    `rope_table` for at least T positions.
    """
    n, t, width = qkv.shape
    dh = 2 * table.shape[2]
    if width != (heads + 2 * kv_heads) * dh or heads % kv_heads or table.shape[1] < t:
        shapes = f"qkv {list(qkv.shape)} and table {list(table.shape)}"
        raise ValueError(f"{shapes} do not go together for {heads} + 2 x {kv_heads} heads")
    if t > SMALL or not qkv.numel() or not use_triton(qkv):
        return rotary_attention_ref(qkv, table, heads, kv_heads, causal)
    if qkv.stride(2) != 1 or not table[0].is_contiguous():
        raise ValueError("rotary_attention needs contiguous last dimensions")
    block = small_block(heads, t, dh)
    y = torch.empty(n, t, heads * dh, dtype=qkv.dtype, device=qkv.device)
    rotary_attention_kernel[(n, -(-heads // block["BLOCK_H"]))](
        **early_launch(qkv, "rotary_attention"),
        qkv_ptr=qkv,
        cos_ptr=table[0],
        sin_ptr=table[1],
        y_ptr=y,
        stride_xn=qkv.stride(0),
        stride_xt=qkv.stride(1),
        T=t,
        H=heads,
        HKV=kv_heads,
        scale=log2(EULER) / sqrt(dh),
        DH=dh,
        SHARE=heads // kv_heads,
        CAUSAL=causal,
        num_warps=small_warps(block),
        **block,
    )
    return y


def rotary_attention_bytes(
    n: int, t: int, heads: int, kv_heads: int, dh: int, itemsize: int
) -> int:
    """Bytes that must move: qkv and the angles in, y out."""
    return n * t * 2 * (heads + kv_heads) * dh * itemsize + 4 * t * dh


def small_block(heads: int, s: int, dh: int) -> dict[str, int]:
    """Heads a program: 512 key elements, 16 a thread; one head where it alone has more."""
    block_s, block_d = next_power_of_2(s), next_power_of_2(dh)
    block_h = max(1, min(next_power_of_2(heads), 512 // (block_s * block_d)))
    return {"BLOCK_H": block_h, "BLOCK_S": block_s, "BLOCK_D": block_d}


def small_warps(block: dict[str, int]) -> int:
    return max(1, min(4, block["BLOCK_H"] * block["BLOCK_S"] * block["BLOCK_D"] // 512))


def compile_cases() -> Iterator[Case]:
    """The patch encoder (64 heads x 16, 4 positions), also causal, and the largest size."""
    for dtype, t, causal in (
        ("bf16", 4, False),
        ("bf16", 4, True),
        ("fp32", 4, False),
        ("bf16", SMALL, True),
    ):
        signature = pointers(fp32="cos sin") | pointers(**{dtype: "qkv y"})
        block = small_block(64, t, 16)
        yield Case(
            f"rotary_attention {dtype} T={t}" + " causal" * causal,
            rotary_attention_kernel,
            signature | {"scale": "fp32"},
            {"DH": 16, "SHARE": 1, "CAUSAL": causal} | block,
            small_warps(block),
            ieee=dtype == "fp32",
            wide_loads=True,
            unaligned=("T", "H", "HKV"),
        )
