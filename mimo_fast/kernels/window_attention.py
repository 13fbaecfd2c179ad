"""Softmax attention in a window: query i sees the existing keys among i - left ... i + right.

    y[i] = sum_j softmax_j(q[i] . k[j] / sqrt(Dh)) v[j],   j in [i - left, i + right] and in [0, T)

Shapes: q, k, v, y [H, T, Dh], any strides over H and T. Scores, softmax and sums are float32; with
16-bit inputs the unnormalised softmax weights are rounded to that dtype. y is rounded once.

One program a head and 32 queries: an online softmax over the blocks of keys that any of them sees,
from the first such key on (3 blocks for the vocoder's window of 40 and 10), so work and memory are
linear in T. Bytes: q, k, v and y once; the overlap of neighbouring windows comes from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import e as EULER
from math import log2, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.dispatch import Case, jit, next_power_of_2, pointers, tl, use_triton
from mimo_fast.kernels.sdpa import sdpa

WINDOW_BLOCK = 256
"""Queries that the reference processes at once."""

BLOCK = 32
"""Queries a program, and keys a block."""


def window_attention_ref(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    heads, t, dh = q.shape
    blocks = -(-t // WINDOW_BLOCK)
    span = WINDOW_BLOCK + left + right
    queries = F.pad(q, (0, 0, 0, blocks * WINDOW_BLOCK - t)).view(heads, blocks, WINDOW_BLOCK, dh)
    # Block n of keys starts left positions before its first query.
    padding = (0, 0, left, blocks * WINDOW_BLOCK - t + right)
    keys, values = (
        F.pad(x, padding).unfold(1, span, WINDOW_BLOCK).transpose(-1, -2) for x in (k, v)
    )
    query = torch.arange(WINDOW_BLOCK, device=q.device, dtype=torch.int64)[:, None]
    key = torch.arange(span, device=q.device, dtype=torch.int64)
    in_window = (key >= query) & (key <= query + left + right)
    position = (
        torch.arange(blocks, device=q.device, dtype=torch.int64)[:, None, None] * WINDOW_BLOCK
        + key
        - left
    )
    visible = in_window & (position >= 0) & (position < t)
    # Rows past the end see no key; they attend to everything, which avoids NaN.
    visible |= ~visible.any(-1, keepdim=True)
    out = sdpa(queries, keys, values, attn_mask=visible)
    return out.reshape(heads, blocks * WINDOW_BLOCK, dh)[:, :t]


@jit
def window_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    stride_qh,
    stride_qt,
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    stride_yh,
    stride_yt,
    T,
    LEFT,
    RIGHT,
    scale,
    DH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_q = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d[None, :] < DH
    m_q = (o_q[:, None] < T) & m_d
    q_row = q_ptr + i_head * stride_qh + o_q.to(tl.int64)[:, None] * stride_qt
    b_q = tl.load(q_row + o_d[None, :], mask=m_q, other=0.0)
    b_max = tl.full([BLOCK_T], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    first = tl.maximum(i_block * BLOCK_T - LEFT, 0)
    end = tl.minimum(i_block * BLOCK_T + BLOCK_T + RIGHT, T)
    for start in range(first, end, BLOCK_T):
        o_k = start + tl.arange(0, BLOCK_T)
        m_k = (o_k[:, None] < T) & m_d
        o_kt = o_k.to(tl.int64)[:, None]
        o_key = i_head * stride_kh + o_kt * stride_kt + o_d[None, :]
        o_value = i_head * stride_vh + o_kt * stride_vt + o_d[None, :]
        b_k = tl.load(k_ptr + o_key, mask=m_k, other=0.0)
        b_v = tl.load(v_ptr + o_value, mask=m_k, other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_seen = (
            (o_k[None, :] >= o_q[:, None] - LEFT)
            & (o_k[None, :] <= o_q[:, None] + RIGHT)
            & (o_k[None, :] < T)
        )
        b_scores = tl.where(m_seen, b_scores, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        # A query that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.exp2(b_scores - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_y = b_y * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new
    b_y = b_y / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    y_row = y_ptr + i_head * stride_yh + o_q.to(tl.int64)[:, None] * stride_yt
    tl.store(y_row + o_d[None, :], b_y, mask=m_q)


def window_attention(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """q, k, v [H, T, Dh] -> [H, T, Dh]; query i sees the existing keys i - left ... i + right.

    left, right >= 0.
    """
    if not use_triton(q):
        return window_attention_ref(q, k, v, left, right)
    if q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must all be [H, T, Dh]"
        )
    heads, t, dh = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    y = torch.empty(t, heads, dh, dtype=q.dtype, device=q.device).transpose(0, 1)
    window_attention_kernel[(-(-t // BLOCK), heads)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        y_ptr=y,
        **{
            f"stride_{name}{axis}": tensor.stride(i)
            for name, tensor in (("q", q), ("k", k), ("v", v), ("y", y))
            for i, axis in enumerate("ht")
        },
        T=t,
        LEFT=min(left, t),
        RIGHT=min(right, t),
        scale=log2(EULER) / sqrt(dh),
        DH=dh,
        BLOCK_T=BLOCK,
        BLOCK_D=max(16, next_power_of_2(dh)),
        num_warps=2,
        num_stages=2,
    )
    return y


def window_attention_bytes(heads: int, t: int, dh: int, itemsize: int) -> int:
    """Bytes that must move: q, k, v in, y out."""
    return 4 * heads * t * dh * itemsize


def compile_cases() -> Iterator[Case]:
    """The vocoder's 16 heads x 16."""
    for dtype in ("bf16", "fp32"):
        yield Case(
            f"window_attention {dtype}",
            window_attention_kernel,
            pointers(**{dtype: "q k v y"}) | {"scale": "fp32"},
            {"DH": 16, "BLOCK_T": BLOCK, "BLOCK_D": 16},
            2,
            2,
            ieee=dtype == "fp32",
            wide_loads=True,
            unaligned=("T", "LEFT", "RIGHT"),
        )
