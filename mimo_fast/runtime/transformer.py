"""The one Qwen2-style transformer: backbone, patch encoder and patch decoder differ only in weights and attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TransformerConfig
from ..kernels.attention import attention, decode_attention
from ..kernels.norm import RMSNorm, rms_norm
from ..kernels.qmatmul import QuantizedWeight, Weight, matmul
from ..kernels.rope import rope, rope_append
from ..quantization import WeightSource
from .state import KVCache

AnyWeight = Weight | QuantizedWeight

Attend = Callable[[int, Tensor], Tensor]
"""(layer, qkv [N, T, (H + 2 Hkv) Dh]) -> [N, T, H Dh]."""

GetTensor = Callable[[str], Tensor]
"""Tensor by upstream's name, already on its device and in its dtype."""


@dataclass(frozen=True)
class LayerWeights:
    attention_norm: Tensor
    qkv: AnyWeight
    out: AnyWeight
    ffn_norm: Tensor
    gate_up: AnyWeight
    down: AnyWeight


@dataclass(frozen=True)
class TransformerWeights:
    layers: tuple[LayerWeights, ...]
    norm: Tensor


def transformer_weights(prefix: str, config: TransformerConfig, source: WeightSource) -> TransformerWeights:
    def layer(name: str) -> LayerWeights:
        return LayerWeights(
            attention_norm=source(f"{name}.input_layernorm.weight"),
            qkv=source.weight(*(f"{name}.self_attn.{part}_proj" for part in "qkv"), bias=True),
            out=source.weight(f"{name}.self_attn.o_proj"),
            ffn_norm=source(f"{name}.post_attention_layernorm.weight"),
            gate_up=source.weight(*(f"{name}.mlp.{part}_proj" for part in ("gate", "up"))),
            down=source.weight(f"{name}.mlp.down_proj"),
        )

    layers = tuple(layer(f"{prefix}.layers.{i}") for i in range(config.layers))
    return TransformerWeights(layers, source(f"{prefix}.norm.weight"))


def transformer(x: Tensor, weights: TransformerWeights, eps: float, attend: Attend) -> Tensor:
    """x [N, T, D] -> final-normed hidden states [N, T, D]."""
    for i, layer in enumerate(weights.layers):
        qkv = matmul(x, layer.qkv, norm=RMSNorm(layer.attention_norm, eps))
        x = matmul(attend(i, qkv), layer.out, residual=x)
        gated = matmul(x, layer.gate_up, norm=RMSNorm(layer.ffn_norm, eps), swiglu=True)
        x = matmul(gated, layer.down, residual=x)
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
    starts = torch.tensor([cache.lengths[slot] for slot in slots], device=table.device)
    places = torch.tensor(slots, device=table.device)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        k_cache, v_cache = cache.k[layer], cache.v[layer]
        q = rope_append(qkv, table, k_cache, v_cache, places, starts, config.heads)
        new = qkv.shape[1]
        if new == 1:
            out = decode_attention(q, k_cache, v_cache, places, starts + 1)
        else:
            (slot,) = slots
            end = cache.lengths[slot] + new
            out = attention(q, k_cache[slot : slot + 1, :, :end], v_cache[slot : slot + 1, :, :end], causal=True)
        return out.transpose(1, 2).flatten(2)

    return attend


def _split_heads(qkv: Tensor, config: TransformerConfig) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (-1, config.head_dim))
    q, k, v = heads.split((config.heads, config.kv_heads, config.kv_heads), dim=2)
    return q, k, v
