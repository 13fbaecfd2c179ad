"""The Qwen2-style transformer of backbone, patch encoder and patch decoder.

The three differ only in weights and attention.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.attention import attention, rotary_attention
from mimo_fast.kernels.decode_attention import decode_attention
from mimo_fast.kernels.matmul.product import AnyWeight, matmul
from mimo_fast.kernels.norm import RMSNorm, rms_norm
from mimo_fast.kernels.prefill_attention import prefill_attention
from mimo_fast.kernels.rope import rope_append
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.lm.state import KVCache

Attend = Callable[[int, Tensor], Tensor]
"""Attention of one layer: (layer, qkv [N, T, (H + 2 Hkv) Dh]) -> [N, T, H Dh]."""

GetTensor = Callable[[str], Tensor]
"""Reads a tensor by upstream's name, on its device and in its dtype."""


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


def transformer_weights(
    prefix: str, config: TransformerConfig, source: WeightSource
) -> TransformerWeights:
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


def transformer(
    x: Tensor,
    weights: TransformerWeights,
    eps: float,
    attend: Attend,
    product: Callable[..., Tensor] = matmul,
) -> Tensor:
    """x [N, T, D] -> final-normed hidden states [N, T, D]; product: `matmul` or one like it."""
    for output in layer_outputs(x, weights, eps, attend, product):
        x = output
    return rms_norm(x, weights.norm, eps)


def layer_outputs(
    x: Tensor,
    weights: TransformerWeights,
    eps: float,
    attend: Attend,
    product: Callable[..., Tensor] = matmul,
) -> Iterator[Tensor]:
    """The output of each layer [N, T, D], one after the other."""
    for i, layer in enumerate(weights.layers):
        qkv = product(x, layer.qkv, norm=RMSNorm(layer.attention_norm, eps))
        x = product(attend(i, qkv), layer.out, residual=x)
        gated = product(x, layer.gate_up, norm=RMSNorm(layer.ffn_norm, eps), swiglu=True)
        x = product(gated, layer.down, residual=x)
        yield x


def self_attend(config: TransformerConfig, table: Tensor, causal: bool) -> Attend:
    """Attention of N sequences, each to itself, at positions 0 ... T - 1."""

    def attend(_layer: int, qkv: Tensor) -> Tensor:
        return rotary_attention(qkv, table, config.heads, config.kv_heads, causal)

    return attend


def cached_attend(
    config: TransformerConfig,
    table: Tensor,
    cache: KVCache,
    slots: Tensor,
    starts: Tensor,
    max_length: int,
    fixed: bool = False,
) -> Attend:
    """Attention of one new position in each of R rows.

    Row r appends to position starts[r] of slot slots[r] and attends to positions up to it.

    Args:
        slots, starts: int64 [R] on the cache's device, never read by the host.
        max_length, fixed: as in `decode_attention`.
    """

    def attend(layer: int, qkv: Tensor) -> Tensor:
        return decode_attention(
            qkv, table, cache.layer(layer), slots, starts, config.heads, max_length, fixed
        )

    return attend


def prefill_attend(
    config: TransformerConfig, table: Tensor, cache: KVCache, slot: int, start: int
) -> Attend:
    """Causal attention of T new positions of one slot: qkv [1, T, ...] appended from `start` on."""
    slots, starts = (
        torch.tensor([index], device=table.device, dtype=torch.int64) for index in (slot, start)
    )

    def attend(layer: int, qkv: Tensor) -> Tensor:
        layer_cache = cache.layer(layer)
        q = rope_append(qkv, table, layer_cache, slots, starts, config.heads)
        k, v = layer_cache.read(slot, start + qkv.shape[1], qkv.dtype)
        return attention(q, k, v, causal=True).transpose(1, 2).flatten(2)

    return attend


def padded_attend(
    config: TransformerConfig, table: Tensor, cache: KVCache, slots: Tensor, positions: Tensor
) -> Attend:
    """`prefill_attend` for graphs: slots and positions are read only on the device.

    Row t of part n of qkv [N, T, ...] is appended to positions[n, t] of slot slots[n, t] and
    attends up to it.

    Args:
        slots, positions: int64 [N, T], as in `prefill_attention`.
    """

    def attend(layer: int, qkv: Tensor) -> Tensor:
        layer_cache, rows = cache.layer(layer), qkv.flatten(0, 1)[:, None]
        # Each position is a row of its own, so that padding can be left out.
        places = slots.flatten(), positions.flatten()
        q = rope_append(rows, table, layer_cache, *places, config.heads)
        q = q[:, :, 0].unflatten(0, tuple(slots.shape))
        return prefill_attention(q, layer_cache, slots, positions)

    return attend
