"""Key/value caches of one layer, filled up to given positions."""

import math

import torch
from helpers import normal
from torch import Tensor

from mimo_fast.kernels.kv_cache import LayerKV


def filled_cache(
    slots, starts, b, kv_heads, capacity, dh, dtype=torch.float32, quantized=False, garbage=math.nan
) -> LayerKV:
    """Positions from each row's start on are garbage: 127 with huge scales if quantized."""
    shape = (b, kv_heads, capacity, dh)
    stored, value = (torch.int8, 127) if quantized else (dtype, garbage)
    k, v = (torch.full(shape, value, dtype=stored) for _ in range(2))
    scales = [torch.full(shape[:3], garbage) for _ in range(2)] if quantized else []
    cache = LayerKV(k, v, *scales)
    for slot, start in zip(slots, starts, strict=True):
        k, v = (normal(kv_heads, start, dh, seed=slot + i, dtype=dtype) for i in range(2))
        cache.append(slot, 0, k, v)
    return cache


def tensors(cache: LayerKV) -> list[Tensor]:
    return [x for x in (cache.k, cache.v, cache.k_scales, cache.v_scales) if x is not None]


def copied(cache: LayerKV) -> LayerKV:
    return LayerKV(*(x.clone() for x in tensors(cache)))


def as_float32(cache: LayerKV) -> LayerKV:
    """A copy: of float32 keys and values unless they are int8."""
    parts = (x if x.dtype == torch.int8 else x.float() for x in tensors(cache))
    return LayerKV(*(x.clone() for x in parts))
