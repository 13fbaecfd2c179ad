"""Attention at decode, in prefill, in the patch encoder and in the codec, and what is appended to a
cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CODEC, DTYPE, LM, POSITIONS, ROWS, STREAMS, normal, op_case
from benchmarks.harness import Case, Inputs, Outputs
from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.attention import (
    attention,
    attention_bytes,
    rotary_attention,
    rotary_attention_bytes,
    rotary_attention_ref,
)
from mimo_fast.kernels.decode_attention import (
    decode_attention,
    decode_attention_bytes,
    decode_attention_ref,
)
from mimo_fast.kernels.kv_cache import LayerKV, quantize_heads
from mimo_fast.kernels.prefill_attention import (
    prefill_attention,
    prefill_attention_bytes,
    prefill_attention_ref,
)
from mimo_fast.kernels.rope import (
    rope,
    rope_append,
    rope_append_ref,
    rope_bytes,
    rope_ref,
    rope_table,
)
from mimo_fast.kernels.window_attention import (
    window_attention,
    window_attention_bytes,
    window_attention_ref,
)

CONTEXTS = (256, 1024, 4096, 8192)
"""Positions that a step of the backbone attends to."""

CACHE_LIMIT = 2**30
"""Bytes of one layer's cache up to which rows and contexts are combined."""

CHUNK = 256
"""Positions of a prefill chunk."""

SEQUENCES = (8, 64, 512)
"""Positions of the codec's decoder; 8 are a patch."""

CACHES = {"bfloat16": False, "int8": True}
BACKBONE, DECODER, ENCODER = LM.backbone, LM.patch_decoder, LM.patch_encoder
VOCODER_FRAMES = (176, 1024)
"""What a stream computes anew for a patch, and 10 s at once."""


def cases() -> Iterator[Case]:
    for form in CACHES:
        for context in CONTEXTS:
            for rows in STREAMS:
                if rows * context * _position_bytes(BACKBONE, form) <= CACHE_LIMIT:
                    yield _decode("backbone.decode_attention", BACKBONE, rows, context, form)
    for rows in STREAMS:
        yield _decode("patch_decoder.decode_attention", DECODER, rows, LM.patch_steps, "bfloat16")
    for patches in ROWS:
        yield _patch_encoder(patches)
    for context in (CHUNK, 1024, 4096):
        yield _prefill(CHUNK, context)
        for form in CACHES:
            yield _cached_prefill(CHUNK, context, form)
    for form in CACHES:
        yield _append(CHUNK, form)
    for t in SEQUENCES:
        yield _rope(t)
        yield _codec(t)
    for t in VOCODER_FRAMES:
        yield _vocoder(t)


def _position_bytes(config: TransformerConfig, form: str) -> int:
    return decode_attention_bytes(
        [1], config.kv_heads, config.head_dim, DTYPE.itemsize, CACHES[form]
    )


def _width(config: TransformerConfig) -> int:
    return (config.heads + 2 * config.kv_heads) * config.head_dim


def _cache(
    config: TransformerConfig, slots: int, positions: int, form: str, device: torch.device
) -> LayerKV:
    shape = (slots, config.kv_heads, positions, config.head_dim)
    k, v = (normal(device, *shape, seed=seed) for seed in (1, 2))
    if not CACHES[form]:
        return LayerKV(k, v)
    (k, k_scales), (v, v_scales) = quantize_heads(k), quantize_heads(v)
    return LayerKV(k, v, k_scales, v_scales)


def _appended(cache: LayerKV, first: int, count: int) -> Outputs:
    """What an append wrote; scales are float32."""
    place = slice(first, first + count)
    tensors: tuple[Tensor | None, ...] = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return tuple(x[:, :, place] for x in tensors if x is not None)


def _decode(op: str, config: TransformerConfig, rows: int, context: int, form: str) -> Case:
    width, attended = _width(config), config.heads * config.head_dim

    def make(device: torch.device) -> Inputs:
        return {
            "qkv": normal(device, rows, 1, width),
            "slots": torch.arange(rows, device=device),
            "table": rope_table(config.head_dim, config.rope_theta, POSITIONS, device),
            "cache": _cache(config, rows, context, form, device),
            "starts": torch.full((rows,), context - 1, device=device),
            "heads": config.heads,
            "max_length": context,
        }

    def reference(max_length: int, **inputs: Any) -> Tensor:
        return decode_attention_ref(**inputs)

    activations = rows * (width + attended) * DTYPE.itemsize + 4 * config.head_dim
    cached = decode_attention_bytes(
        [context] * rows, config.kv_heads, config.head_dim, DTYPE.itemsize, CACHES[form]
    )
    return op_case(
        op,
        decode_attention,
        reference,
        make,
        m=rows,
        shape=f"M={rows} S={context}",
        form=form,
        nbytes=activations + cached,
        flop=4 * rows * context * attended,
        collect=lambda inputs, y: (y, *_appended(inputs["cache"], context - 1, 1)),
        has_native=not CACHES[form],
    )


def _patch_encoder(patches: int) -> Case:
    t, heads, dh = LM.group_size, ENCODER.heads, ENCODER.head_dim

    def make(device: torch.device) -> Inputs:
        return {
            "qkv": normal(device, patches, t, _width(ENCODER)),
            "table": rope_table(dh, ENCODER.rope_theta, t, device),
            "heads": heads,
            "kv_heads": ENCODER.kv_heads,
            "causal": LM.patch_encoder_causal,
        }

    return op_case(
        "patch_encoder.rotary_attention",
        rotary_attention,
        rotary_attention_ref,
        make,
        m=patches,
        shape=f"M={patches} T={t}",
        nbytes=rotary_attention_bytes(patches, t, heads, ENCODER.kv_heads, dh, 2),
        flop=4 * patches * t * t * heads * dh,
    )


def _prefill(t: int, s: int) -> Case:
    heads, kv_heads, dh = BACKBONE.heads, BACKBONE.kv_heads, BACKBONE.head_dim

    def make(device: torch.device) -> Inputs:
        k, v = (normal(device, 1, kv_heads, s, dh, seed=seed) for seed in (1, 2))
        return {"q": normal(device, 1, heads, t, dh), "k": k, "v": v, "causal": True}

    # Of the newest t positions, half see half of each other.
    pairs = t * (s - t) + t * (t + 1) // 2
    return op_case(
        "backbone.prefill_attention",
        attention,
        attention,
        make,
        m=t,
        shape=f"T={t} S={s}",
        nbytes=attention_bytes(1, t, s, heads, kv_heads, dh, DTYPE.itemsize),
        flop=4 * pairs * heads * dh,
    )


def _cached_prefill(t: int, s: int, form: str) -> Case:
    """The same from the cache, its positions read on the device."""
    heads, kv_heads, dh = BACKBONE.heads, BACKBONE.kv_heads, BACKBONE.head_dim

    def make(device: torch.device) -> Inputs:
        return {
            "q": normal(device, t, heads, dh),
            "cache": _cache(BACKBONE, 1, s, form, device),
            "slots": torch.zeros(t, dtype=torch.int64, device=device),
            "positions": torch.arange(s - t, s, device=device),
        }

    pairs = t * (s - t) + t * (t + 1) // 2
    return op_case(
        "backbone.cached_prefill_attention",
        prefill_attention,
        prefill_attention_ref,
        make,
        m=t,
        shape=f"T={t} S={s}",
        form=form,
        nbytes=prefill_attention_bytes(t, s - t, heads, kv_heads, dh, 2, CACHES[form]),
        flop=4 * pairs * heads * dh,
    )


def _append(t: int, form: str) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "qkv": normal(device, 1, t, _width(BACKBONE)),
            "cache": _cache(BACKBONE, 1, 2 * t, form, device),
            "table": rope_table(BACKBONE.head_dim, BACKBONE.rope_theta, POSITIONS, device),
            "slots": torch.zeros(1, dtype=torch.int64, device=device),
            "starts": torch.full((1,), t, device=device),
            "heads": BACKBONE.heads,
        }

    heads = BACKBONE.heads + 2 * BACKBONE.kv_heads
    return op_case(
        "backbone.kv_append",
        rope_append,
        rope_append_ref,
        make,
        m=t,
        shape=f"T={t}",
        form=form,
        nbytes=rope_bytes(t, heads, BACKBONE.head_dim, DTYPE.itemsize),
        flop=3 * t * heads * BACKBONE.head_dim,
        collect=lambda inputs, q: (q, *_appended(inputs["cache"], t, t)),
    )


def _rope(t: int) -> Case:
    heads, dh = CODEC.decoder_heads, CODEC.dim // CODEC.decoder_heads

    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, t, heads, dh),
            "table": rope_table(dh, CODEC.rope_theta, t, device),
        }

    return op_case(
        "codec.rope",
        rope,
        rope_ref,
        make,
        m=t,
        shape=f"T={t} H={heads} Dh={dh}",
        nbytes=rope_bytes(t, heads, dh, DTYPE.itemsize),
        flop=3 * t * heads * dh,
    )


def _codec(t: int) -> Case:
    """The decoder's attention to what it remembers; its encoder sees both ways."""
    heads, dh, s = CODEC.decoder_heads, CODEC.dim // CODEC.decoder_heads, max(t, 512)

    def make(device: torch.device) -> Inputs:
        k, v = (normal(device, 1, heads, s, dh, seed=seed) for seed in (1, 2))
        return {
            "q": normal(device, 1, heads, t, dh),
            "k": k,
            "v": v,
            "causal": CODEC.decoder_causal,
        }

    pairs = t * (s - t) + t * (t + 1) // 2
    return op_case(
        "codec.attention",
        attention,
        attention,
        make,
        m=t,
        shape=f"T={t} S={s}",
        nbytes=attention_bytes(1, t, s, heads, heads, dh, DTYPE.itemsize),
        flop=4 * pairs * heads * dh,
    )


def _vocoder(t: int) -> Case:
    heads, dh = CODEC.vocoder_heads, CODEC.vocoder_dim // CODEC.vocoder_heads
    left, right = CODEC.vocoder_window

    def make(device: torch.device) -> Inputs:
        q, k, v = (normal(device, heads, t, dh, seed=seed) for seed in range(3))
        return {"q": q, "k": k, "v": v, "left": left, "right": right}

    return op_case(
        "vocoder.window_attention",
        window_attention,
        window_attention_ref,
        make,
        m=t,
        shape=f"T={t} H={heads}",
        nbytes=window_attention_bytes(heads, t, dh, DTYPE.itemsize),
        flop=4 * t * (left + right + 1) * heads * dh,
    )
