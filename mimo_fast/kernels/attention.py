"""Softmax attention, scale 1 / sqrt(Dh), in the three forms the model needs.

    attention:        all queries of a sequence at once, full or causal (prefill, patch encoder, codec)
    decode_attention: one query a row over a cache of that row's own length (decode)
    window_attention: query i sees keys i - left ... i + right (vocoder); cost linear in T

Grouped-query heads: query head h reads key/value head h // (H / Hkv).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_BLOCK = 256


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [N, H, T, Dh], k and v [N, Hkv, S, Dh] with S >= T -> [N, H, T, Dh].

    Causal: query t sees keys up to S - T + t, so that a cache may precede the queries.
    """
    t, s, gqa = q.shape[-2], k.shape[-2], q.shape[1] != k.shape[1]
    if not causal or t == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    if t == s:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=gqa)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """q [R, H, 1, Dh] over caches [B, Hkv, S, Dh]: row r reads the first lengths[r] positions of slot slots[r].

    Returns [R, H, 1, Dh]. Row by row, so that a row's result does not depend on its neighbours.
    """
    rows = []
    for r, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        k, v = k_cache[slot, :, :length], v_cache[slot, :, :length]
        rows.append(attention(q[r : r + 1], k[None], v[None], causal=False))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def window_attention(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """q, k, v [H, T, Dh] -> [H, T, Dh]; query i sees keys i - left ... i + right that exist."""
    heads, t, dh = q.shape
    blocks = -(-t // WINDOW_BLOCK)
    span = WINDOW_BLOCK + left + right
    queries = F.pad(q, (0, 0, 0, blocks * WINDOW_BLOCK - t)).view(heads, blocks, WINDOW_BLOCK, dh)
    # Block n of keys starts left positions before its first query.
    padding = (0, 0, left, blocks * WINDOW_BLOCK - t + right)
    keys, values = (F.pad(x, padding).unfold(1, span, WINDOW_BLOCK).transpose(-1, -2) for x in (k, v))
    query = torch.arange(WINDOW_BLOCK, device=q.device)[:, None]
    key = torch.arange(span, device=q.device)
    in_window = (key >= query) & (key <= query + left + right)
    position = torch.arange(blocks, device=q.device)[:, None, None] * WINDOW_BLOCK + key - left
    visible = in_window & (position >= 0) & (position < t)
    # Rows past the end see nothing; let them see everything rather than produce NaN.
    visible |= ~visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
    return out.reshape(heads, blocks * WINDOW_BLOCK, dh)[:, :t]
