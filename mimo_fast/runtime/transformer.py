"""The one Qwen2-style transformer: backbone, patch encoder and patch decoder differ only in weights and attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TransformerConfig
from ..kernels.attention import attention, decode_attention
from ..kernels.norm import rms_norm
from ..kernels.qmatmul import Weight, matmul
from ..kernels.rope import rope
from ..kernels.swiglu import swiglu
from .state import KVCache

Attend = Callable[[int, Tensor], Tensor]
"""(layer, qkv [N, T, (H + 2 Hkv) Dh]) -> [N, T, H Dh]."""

GetTensor = Callable[[str], Tensor]
"""Tensor by upstream's name, already on its device and in its dtype."""


@dataclass(frozen=True)
class LayerWeights:
    attention_norm: Tensor
    qkv: Weight
    out: Weight
    ffn_norm: Tensor
    gate_up: Weight
    down: Weight


@dataclass(frozen=True)
class TransformerWeights:
    layers: tuple[LayerWeights, ...]
    norm: Tensor


def transformer_weights(prefix: str, config: TransformerConfig, get: GetTensor) -> TransformerWeights:
    def layer(name: str) -> LayerWeights:
        qkv = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        return LayerWeights(
            attention_norm=get(f"{name}.input_layernorm.weight"),
            qkv=Weight.stack([get(f"{part}.weight") for part in qkv], [get(f"{part}.bias") for part in qkv]),
            out=Weight.stack([get(f"{name}.self_attn.o_proj.weight")]),
            ffn_norm=get(f"{name}.post_attention_layernorm.weight"),
            gate_up=Weight.stack([get(f"{name}.mlp.{part}_proj.weight") for part in ("gate", "up")]),
            down=Weight.stack([get(f"{name}.mlp.down_proj.weight")]),
        )

    layers = tuple(layer(f"{prefix}.layers.{i}") for i in range(config.layers))
    return TransformerWeights(layers, get(f"{prefix}.norm.weight"))


def transformer(x: Tensor, weights: TransformerWeights, eps: float, attend: Attend) -> Tensor:
    """x [N, T, D] -> final-normed hidden states [N, T, D]."""
    for i, layer in enumerate(weights.layers):
        qkv = matmul(rms_norm(x, layer.attention_norm, eps), layer.qkv)
        x = x + matmul(attend(i, qkv), layer.out)
        gate_up = matmul(rms_norm(x, layer.ffn_norm, eps), layer.gate_up)
        x = x + matmul(swiglu(gate_up), layer.down)
    return rms_norm(x, weights.norm, eps)


def self_attend(config: TransformerConfig, table: Tensor, causal: bool) -> Attend:
    """Each of N sequences attends to itself, positions 0 ... T - 1."""

    def attend(_layer: int, qkv: Tensor) -> Tensor:
        q, k, v = _split_heads(qkv, config)
        cos_sin = table[:, : qkv.shape[1]]
        out = attention(rope(q, cos_sin).transpose(1, 2), rope(k, cos_sin).transpose(1, 2), v.transpose(1, 2), causal)
        return out.transpose(1, 2).flatten(2)

    return attend


def cached_attend(config: TransformerConfig, table: Tensor, cache: KVCache, slots: list[int]) -> Attend:
    """Row r appends its T positions to slot slots[r] of the cache and attends causally to the whole slot.

    Several rows, or several positions of one row. The caller advances `cache.lengths` after the last layer.
    """
    starts = [cache.lengths[slot] for slot in slots]

    def attend(layer: int, qkv: Tensor) -> Tensor:
        new = qkv.shape[1]
        q, k, v = _split_heads(qkv, config)
        cos_sin = torch.stack([table[:, start : start + new] for start in starts], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (rope(q, cos_sin), rope(k, cos_sin), v))
        k_cache, v_cache = cache.k[layer], cache.v[layer]
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            k_cache[slot, :, start : start + new] = k[row]
            v_cache[slot, :, start : start + new] = v[row]
        ends = [start + new for start in starts]
        if new == 1:
            out = decode_attention(q, k_cache, v_cache, slots, ends)
        else:
            (slot,), (end,) = slots, ends
            out = attention(q, k_cache[slot : slot + 1, :, :end], v_cache[slot : slot + 1, :, :end], causal=True)
        return out.transpose(1, 2).flatten(2)

    return attend


def _split_heads(qkv: Tensor, config: TransformerConfig) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (-1, config.head_dim))
    q, k, v = heads.split((config.heads, config.kv_heads, config.kv_heads), dim=2)
    return q, k, v
