"""Softmax attention, scale 1 / sqrt(Dh), in the forms the model needs.

    attention:        all queries of a sequence at once, full or causal (prefill, patch encoder, codec)
    decode_attention: one query a row over a cache of that row's own length (decode)
    window_attention: query i sees keys i - left ... i + right (vocoder); in its own file

Shapes: q [N, H, T, Dh], k and v [N, Hkv, S, Dh], any strides but the last. Grouped-query heads: query head h reads
key/value head h // (H / Hkv). Scores, softmax and sums are float32, the result is rounded once; with 16-bit inputs
`split_attention_kernel` also rounds the unnormalised probabilities to that dtype to weight the values.

S <= 16 (the 4-token patch encoder and the 11-position cache of the patch decoder, 64 heads x 16):
`small_attention_kernel`, a few heads a program, one warp for 512 key elements; keys and values stay in registers while
the queries pass. Nothing is as small as the launch itself here.

Decoding over a long cache: `split_attention_kernel`, split-KV. A program holds all H / Hkv query heads of one key/value
head, so a key is read once, and one of SPLITS equal parts of the row's length, in blocks of 32 keys of which two are
in flight. The length is read on the device, so one captured graph serves every length; SPLITS depends on the cache's
capacity alone, so a row's result depends on nothing around it. `merge_splits_kernel` then joins the parts in order.
Bytes: 2 length Hkv Dh of cache, and 8 SPLITS H Dh of float32 partials (6% of it at 8192).

All else goes to torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import e as EULER
from math import log2, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Case, jit, next_power_of_2, tl, use_triton
from .window_attention import WINDOW_BLOCK, window_attention

__all__ = ["WINDOW_BLOCK", "attention", "attention_ref", "decode_attention", "decode_attention_ref", "window_attention"]

SMALL = 16
"""Keys and values of so many positions are held in registers."""

SPLITS = ((64, 1), (256, 4), (1024, 16))
"""(largest capacity, splits); 64 beyond."""

BLOCK_S = 32


def attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    t, s, gqa = q.shape[-2], k.shape[-2], q.shape[1] != k.shape[1]
    if not causal or t == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    if t == s:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=gqa)


def decode_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    rows = []
    for r, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        k, v = k_cache[slot, :, :length], v_cache[slot, :, :length]
        rows.append(attention_ref(q[r : r + 1], k[None], v[None], causal=False))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


@jit
def small_attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, slots_ptr, lengths_ptr, stride_qn, stride_qh, stride_qt, stride_kn, stride_kh,
    stride_ks, stride_vn, stride_vh, stride_vs, T, S, H, scale, DH: tl.constexpr, SHARE: tl.constexpr,
    CAUSAL: tl.constexpr, CACHED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    if CACHED:
        i_kv, length = tl.load(slots_ptr + i_n), tl.load(lengths_ptr + i_n).to(tl.int32)
    else:
        i_kv, length = i_n, S
    m_h = (o_h < H)[:, None] & (o_d < DH)[None, :]
    m_kv = m_h[:, None, :] & (o_s < length)[None, :, None]
    o_kv = (o_h // SHARE)[:, None, None]
    o_k = o_kv * stride_kh + o_s[None, :, None] * stride_ks + o_d[None, None, :]
    o_v = o_kv * stride_vh + o_s[None, :, None] * stride_vs + o_d[None, None, :]
    b_k = tl.load(k_ptr + i_kv * stride_kn + o_k, mask=m_kv, other=0.0).to(tl.float32)
    b_v = tl.load(v_ptr + i_kv * stride_vn + o_v, mask=m_kv, other=0.0).to(tl.float32)
    for i_t in range(T):
        o_q = o_h[:, None] * stride_qh + i_t * stride_qt + o_d[None, :]
        b_q = tl.load(q_ptr + i_n * stride_qn + o_q, mask=m_h, other=0.0).to(tl.float32) * scale
        b_scores = tl.sum(b_k * b_q[:, None, :], axis=2)
        end = length - T + i_t + 1 if CAUSAL else length
        b_scores = tl.where((o_s < end)[None, :], b_scores, -float("inf"))
        b_max = tl.max(b_scores, axis=1)
        # A row of length 0 gives 0.
        b_p = tl.exp2(b_scores - tl.where(b_max == -float("inf"), 0.0, b_max)[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_y = tl.sum(b_p[:, :, None] * b_v, axis=1) / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        o_y = ((i_n * T + i_t) * H + o_h)[:, None] * DH + o_d[None, :]
        tl.store(y_ptr + o_y, b_y.to(y_ptr.dtype.element_ty), mask=m_h)


@jit
def split_attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, part_ptr, stats_ptr, slots_ptr, lengths_ptr, stride_qr, stride_qh, stride_kn, stride_kh,
    stride_ks, stride_vn, stride_vh, stride_vs, H, scale, DH: tl.constexpr, SHARE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_split, i_kv, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_slot, length = tl.load(slots_ptr + i_row), tl.load(lengths_ptr + i_row).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    first = i_split * part
    end = tl.minimum(first + part, length)
    o_g, o_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    o_h = i_kv * SHARE + o_g
    m_d = (o_d < DH)[None, :]
    m_q = (o_g < SHARE)[:, None] & m_d
    b_q = tl.load(q_ptr + i_row * stride_qr + o_h[:, None] * stride_qh + o_d[None, :], mask=m_q, other=0.0)
    k_head = k_ptr + i_slot * stride_kn + i_kv.to(tl.int64) * stride_kh
    v_head = v_ptr + i_slot * stride_vn + i_kv.to(tl.int64) * stride_vh
    b_max = tl.full([BLOCK_G], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_G], tl.float32)
    b_y = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < end
        b_k = tl.load(k_head + o_s[:, None] * stride_ks + o_d[None, :], mask=m_s[:, None] & m_d, other=0.0)
        b_v = tl.load(v_head + o_s[:, None] * stride_vs + o_d[None, :], mask=m_s[:, None] & m_d, other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_scores = tl.where(m_s[None, :], b_scores, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_p = tl.exp2(b_scores - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_y = b_y * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new
    o_row = i_row * H + o_h
    if SPLITS == 1:
        b_y = b_y / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        tl.store(y_ptr + o_row[:, None] * DH + o_d[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m_q)
    elif first < length:
        o_part = o_row * SPLITS + i_split
        tl.store(part_ptr + o_part[:, None] * DH + o_d[None, :], b_y, mask=m_q)
        tl.store(stats_ptr + o_part * 2, b_max, mask=o_g < SHARE)
        tl.store(stats_ptr + o_part * 2 + 1, b_sum, mask=o_g < SHARE)


@jit
def merge_splits_kernel(
    part_ptr, stats_ptr, y_ptr, lengths_ptr, H,
    DH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_head, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_row).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    o_split, o_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    m_split = o_split * part < length
    m_d = o_d < DH
    o_part = (i_row * H + i_head) * SPLITS + o_split
    b_max = tl.load(stats_ptr + o_part * 2, mask=m_split, other=-float("inf"))
    b_sum = tl.load(stats_ptr + o_part * 2 + 1, mask=m_split, other=0.0)
    b_y = tl.load(part_ptr + o_part[:, None] * DH + o_d[None, :], mask=m_split[:, None] & m_d[None, :], other=0.0)
    b_top = tl.max(b_max, axis=0)
    b_weight = tl.exp2(b_max - tl.where(b_top == -float("inf"), 0.0, b_top))
    b_total = tl.sum(b_weight * b_sum, axis=0)
    b_y = tl.sum(b_weight[:, None] * b_y, axis=0) / tl.where(b_total > 0, b_total, 1.0)
    tl.store(y_ptr + (i_row * H + i_head) * DH + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [N, H, T, Dh], k and v [N, Hkv, S, Dh] with S >= T -> [N, H, T, Dh].

    Causal: query t sees keys up to S - T + t, so that a cache may precede the queries.
    """
    if k.shape[-2] > SMALL or not use_triton(q):
        return attention_ref(q, k, v, causal)
    _check_heads(q, k, v)
    return _small_attention(q, k, v, causal, None, None)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | Sequence[int],
    lengths: Tensor | Sequence[int],
    max_length: int | None = None,
) -> Tensor:
    """q [R, H, 1, Dh] over caches [B, Hkv, S, Dh]: row r reads the first lengths[r] positions of slot slots[r].

    slots and lengths: int64 [R] on q's device, or lists. max_length: no length exceeds it; by default S. It decides
    how the work is split, and so the rounding: give every step of a run the same. Returns [R, H, 1, Dh].
    """
    if not use_triton(q):
        slots, lengths = (x.tolist() if isinstance(x, Tensor) else x for x in (slots, lengths))
        return decode_attention_ref(q, k_cache, v_cache, slots, lengths)
    _check_heads(q, k_cache, v_cache)
    slots, lengths = (x if isinstance(x, Tensor) else torch.tensor(x, device=q.device) for x in (slots, lengths))
    if not len(q) == len(slots) == len(lengths) or q.shape[2] != 1:
        raise ValueError(f"q {list(q.shape)} must be [R, H, 1, Dh] for {len(slots)} slots and {len(lengths)} lengths")
    if k_cache.shape[2] <= SMALL:
        return _small_attention(q, k_cache, v_cache, False, slots, lengths)
    return _split_attention(q, k_cache, v_cache, slots, lengths, max_length or k_cache.shape[2])


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} do not go with q {list(q.shape)}")
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("q, k and v must be contiguous over the head's dimension")


def _small_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, slots: Tensor | None, lengths: Tensor | None
) -> Tensor:
    n, heads, t, dh = q.shape
    block = _small_block(heads, k.shape[2], dh)
    y = torch.empty(n, t, heads, dh, dtype=q.dtype, device=q.device)
    small_attention_kernel[(n, -(-heads // block["BLOCK_H"]))](
        q_ptr=q, k_ptr=k, v_ptr=v, y_ptr=y, slots_ptr=q if slots is None else slots,
        lengths_ptr=q if lengths is None else lengths, stride_qn=q.stride(0), stride_qh=q.stride(1),
        stride_qt=q.stride(2), stride_kn=k.stride(0), stride_kh=k.stride(1), stride_ks=k.stride(2),
        stride_vn=v.stride(0), stride_vh=v.stride(1), stride_vs=v.stride(2), T=t, S=k.shape[2], H=heads,
        scale=log2(EULER) / sqrt(dh), SHARE=heads // k.shape[1], CAUSAL=causal, CACHED=slots is not None,
        num_warps=_small_warps(block), DH=dh, **block,
    )  # fmt: skip
    return y.transpose(1, 2)


def _small_block(heads: int, s: int, dh: int) -> dict[str, int]:
    """Heads a program so that it holds 512 key elements, 16 a thread; one head where that alone is more."""
    block_s, block_d = next_power_of_2(s), next_power_of_2(dh)
    block_h = max(1, min(next_power_of_2(heads), 512 // (block_s * block_d)))
    return {"BLOCK_H": block_h, "BLOCK_S": block_s, "BLOCK_D": block_d}


def _small_warps(block: dict[str, int]) -> int:
    return max(1, min(4, block["BLOCK_H"] * block["BLOCK_S"] * block["BLOCK_D"] // 512))


def _split_attention(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, max_length: int
) -> Tensor:
    rows, heads, _, dh = q.shape
    splits = next((count for limit, count in SPLITS if max_length <= limit), 64)
    share, block_d = heads // k.shape[1], max(16, next_power_of_2(dh))
    y = torch.empty(rows, 1, heads, dh, dtype=q.dtype, device=q.device)
    part, stats = (
        y if splits == 1 else torch.empty(rows, heads, splits, width, device=q.device) for width in (dh, 2)
    )
    split_attention_kernel[(splits, k.shape[1], rows)](
        q_ptr=q, k_ptr=k, v_ptr=v, y_ptr=y, part_ptr=part, stats_ptr=stats, slots_ptr=slots, lengths_ptr=lengths,
        stride_qr=q.stride(0), stride_qh=q.stride(1), stride_kn=k.stride(0), stride_kh=k.stride(1),
        stride_ks=k.stride(2), stride_vn=v.stride(0), stride_vh=v.stride(1), stride_vs=v.stride(2), H=heads,
        scale=log2(EULER) / sqrt(dh), DH=dh, SHARE=share, SPLITS=splits, BLOCK_G=max(16, next_power_of_2(share)),
        BLOCK_S=BLOCK_S, BLOCK_D=block_d, num_warps=2 * q.element_size(), num_stages=3,
    )  # fmt: skip
    if splits > 1:
        merge_splits_kernel[(heads, rows)](
            part_ptr=part, stats_ptr=stats, y_ptr=y, lengths_ptr=lengths, H=heads, DH=dh, SPLITS=splits,
            BLOCK_S=BLOCK_S, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return y.transpose(1, 2)


def decode_attention_bytes(lengths: Sequence[int], kv_heads: int, dh: int, itemsize: int) -> int:
    """Bytes that must move: the keys and values of each row's length."""
    return 2 * sum(lengths) * kv_heads * dh * itemsize


def compile_cases() -> Iterator[Case]:
    """Patch encoder and decoder (64 heads x 16), backbone (32/8 heads x 128); also float32 and the tiny cache."""
    strides = {f"stride_{x}{axis}": "i32" for x, axes in (("q", "nht"), ("k", "nhs"), ("v", "nhs")) for axis in axes}
    integers = ("T", "S", "H")
    index = {"slots_ptr": "*i64", "lengths_ptr": "*i64"}
    for name, s, causal, cached in (("patch encoder", 4, False, False), ("11 causal", 11, True, False),
                                    ("patch decoder step", 11, False, True)):
        pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr"), "*bf16")
        signature = pointers | index | strides | dict.fromkeys(integers, "i32") | {"scale": "fp32"}
        block = _small_block(64, s, 16)
        flags = {"DH": 16, "SHARE": 1, "CAUSAL": causal, "CACHED": cached}
        yield Case(f"small_attention {name}", small_attention_kernel, signature, flags | block, _small_warps(block),
                   wide_loads=True, unaligned=("T", "S"))  # fmt: skip
    strides = {f"stride_{x}": "i32" for x in ("qr", "qh", "kn", "kh", "ks", "vn", "vh", "vs")}
    block = {"DH": 128, "BLOCK_S": BLOCK_S, "BLOCK_D": 128}
    floats = {"part_ptr": "*fp32", "stats_ptr": "*fp32"}
    for dtype, splits in (("bf16", 64), ("bf16", 16), ("bf16", 4), ("bf16", 1), ("fp32", 64)):
        pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr"), f"*{dtype}")
        signature = pointers | floats | index | strides | {"H": "i32", "scale": "fp32"}
        yield Case(f"split_attention {dtype} splits={splits}", split_attention_kernel, signature,
                   block | {"SHARE": 4, "SPLITS": splits, "BLOCK_G": 16}, 4 if dtype == "bf16" else 8, 3,
                   ieee=dtype == "fp32", wide_loads=True)  # fmt: skip
        if splits > 1:
            signature = floats | {"y_ptr": f"*{dtype}", "lengths_ptr": "*i64", "H": "i32"}
            yield Case(f"merge_splits {dtype} splits={splits}", merge_splits_kernel, signature,
                       block | {"SPLITS": splits}, 4, wide_loads=True)
