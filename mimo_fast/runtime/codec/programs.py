"""The tables of the persistent kernel (kernels/cuda/engine.py) for a codec's decoder and vocoder.

Phases of a layer, as the operations of `CodecLayer`:

    qkv       LayerNorm, product, bias
    attend    decoder: new positions of each stream over its ring; vocoder: frames near each other
    out       product, bias, residual       y
    up        LayerNorm, product, bias, GELU
    down      product, bias, residual y     x of the next layer
"""

from __future__ import annotations

import torch

from mimo_fast.kernels.cuda.engine import Vector
from mimo_fast.kernels.cuda.engine_streams import (
    FRAME_HEAD,
    FrameTables,
    LayerNorm,
    RingTables,
    StreamTables,
)
from mimo_fast.runtime.codec.layers import LAYER_NORM_EPS, CodecLayer, CodecStack, Norm
from mimo_fast.runtime.codec.state import decoder_context


def decoder_tables(stack: CodecStack, dtype: torch.dtype, blocks: int) -> RingTables:
    """All layers: "x" -> "y", [rows, D] each."""
    tables = RingTables(dtype, blocks, stack.heads, decoder_context(stack.window))
    _add_layers(tables, tuple(stack.layers))
    return tables


def vocoder_tables(stack: CodecStack, dtype: torch.dtype) -> FrameTables:
    """All layers: "x" -> "y", [rows, D] each."""
    layers = tuple(stack.layers)
    columns = stack.heads * FRAME_HEAD
    tables = FrameTables(dtype, stack.heads, len(layers), stack.window, columns)
    _add_layers(tables, layers)
    return tables


def _add_layers(tables: StreamTables, layers: tuple[CodecLayer, ...]) -> None:
    def normed(norm: Norm) -> LayerNorm:
        assert norm.bias is not None
        return LayerNorm(norm.weight, norm.bias, LAYER_NORM_EPS)

    x: Vector | str = "x"
    for i, layer in enumerate(layers):
        qkv = tables.product_of_rows(layer.qkv, x, norm=normed(layer.attention_norm))
        y = tables.product_of_rows(layer.out, tables.attend(qkv, i), residual=x)
        up = tables.product_of_rows(layer.up, y, norm=normed(layer.ffn_norm), gelu=True)
        if i + 1 == len(layers):
            tables.deliver_rows(layer.down, up, "y", residual=y)
        else:
            x = tables.product_of_rows(layer.down, up, residual=y)
