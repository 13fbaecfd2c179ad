"""All layers of a small codec stack in one native call.

    y = x + out(attend(qkv(norm(x)))),  x = y + down(gelu(up(norm(y))))       layer after layer

`run`, for incremental decoding: the rotated key and the value of row t are written to place
slots[t] of a layer's buffer; row t then attends to the places of that buffer that visible[t] marks.
Ring buffers and windows are both of that form. It runs on the caller's thread.

`run_sequences`, for whole sequences such as recordings: rows of all of them pass the products
together and are divided among threads; a row attends to its own sequence. The bits of a sequence
depend neither on the others nor on the number of threads.

It takes the sizes and types that `transformer.py` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.transformer import AnyWeight, is_plain, linear, takes_parts
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight

Norm = tuple[Tensor, Tensor | None]
"""Weight and bias of a LayerNorm, or the weight of an RMSNorm and None."""

Layer = tuple[Norm, AnyWeight, AnyWeight, Norm, AnyWeight, AnyWeight]
"""Norm, qkv, out, norm, up, down."""


class CodecStack:
    """Layers of one width D; eps is that of their norms.

    Raises:
        ValueError: weights do not fit each other.
    """

    def __init__(self, layers: Sequence[Layer], heads: int, eps: float) -> None:
        self._arguments = (tuple(layers), heads, eps)
        compiled = native.compiled()
        native.expect(bool(layers), "there are no layers")
        self.dim, self.heads, self.layers = len(layers[0][0][0]), heads, len(layers)
        self.native = compiled.CodecStack(dim=self.dim, heads=heads, eps=eps)
        for attention_norm, qkv, out, ffn_norm, up, down in layers:
            self.native.add_layer(
                attention_norm=self.norm(attention_norm),
                qkv=linear(qkv),
                out=linear(out),
                ffn_norm=self.norm(ffn_norm),
                up=linear(up),
                down=linear(down),
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def norm(self, norm: Norm) -> Any:
        """The native view of a norm of this width.

        Raises:
            ValueError: it is of another.
        """
        weight, bias = norm
        native.expect(
            is_plain(weight)
            and is_plain(bias)
            and weight.shape == (self.dim,)
            and (bias is None or bias.shape == weight.shape),
            f"a norm is not float32 [{self.dim}] on a CPU, contiguous and frozen",
        )
        return native.compiled().Norm(**native.addresses(weight=weight, bias=bias))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy reads the copied weights.
        return type(self), self._arguments

    def run_rows(
        self,
        x: Tensor,
        table: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        visible: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`run` of N sequences, see `runtime/codec/layers.py`'s `LayerByLayer.run_rows`."""
        places = range(len(x)) if rows is None else rows.tolist()
        return torch.stack(
            [
                self.run(x[n], table[:, n], k[row], v[row], slots[n], visible[n])
                for n, row in enumerate(places)
            ]
        )

    def run_sequences(
        self,
        sequences: Sequence[Tensor],
        table: Tensor,
        window: tuple[int, int],
        skip_layer: int | None = None,
    ) -> list[Tensor]:
        """Whole sequences [T, D] -> [T, D] each, T >= 0.

        Args:
            table: `rope_table` [2, sum of T, Dh / 2] of the rows' positions.
            window: rows before and after its own that a row sees; negative for all.
            skip_layer: the layer, counted from 1, whose output is added to the last one's.

        Raises:
            ValueError: shapes or types are others.
        """
        lengths = [len(x) for x in sequences]
        for x in sequences:
            if x.shape[1:] != (self.dim,) or x.dtype != torch.float32:
                raise ValueError(f"x is {x.dtype} {list(x.shape)}, not float32 [T, {self.dim}]")
        if not lengths:
            return []
        native.check_table(table, self.head_dim)
        if table.shape[1] != sum(lengths):
            raise ValueError(f"the table has {table.shape[1]} rows for {sum(lengths)} of sequences")
        y = torch.cat([*sequences])
        sizes = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        left, right = (reach if reach >= 0 else max(lengths) for reach in window)
        found = native.compiled().CodecSequences(
            **native.addresses(lengths=sizes, table=table),
            count=len(lengths),
            left=left,
            right=right,
        )
        self.native.run_sequences(
            **native.addresses(x=y), rows=len(y), sequences=found, skip=skip_layer or 0
        )
        return [*y.split(lengths)]

    def run(
        self, x: Tensor, table: Tensor, k: Tensor, v: Tensor, slots: Tensor, visible: Tensor
    ) -> Tensor:
        """x [T, D] -> [T, D].

        table [2, T, Dh / 2]: rows of `rope_table` for the positions of the rows. k, v [L, H, S,
        Dh], contiguous and written in place at slots, int64 [T]. visible: bool [T, S].

        Raises:
            ValueError: shapes or types are others, or a slot is no place.
        """
        if x.ndim != 2 or k.ndim != 4:
            raise ValueError(f"x is {list(x.shape)}, not [T, {self.dim}], or k not [L, H, S, Dh]")
        rows, head_dim, places = len(x), self.dim // self.heads, k.shape[2]
        if x.shape != (rows, self.dim) or x.dtype != torch.float32:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not float32 [T, {self.dim}]")
        shape = (self.layers, self.heads, places, head_dim)
        for buffer in (k, v):
            if buffer.shape != shape or buffer.dtype != torch.float32 or not buffer.is_contiguous():
                raise ValueError(f"a buffer is {list(buffer.shape)}, not float32 {list(shape)}")
        if table.shape != (2, rows, head_dim // 2) or table.dtype != torch.float32:
            raise ValueError(f"the table is not float32 [2, {rows}, {head_dim // 2}]")
        if slots.shape != (rows,) or slots.dtype != torch.int64 or not slots.is_contiguous():
            raise ValueError(f"slots are not int64 [{rows}]")
        if visible.shape != (rows, places) or visible.dtype != torch.bool:
            raise ValueError(f"visible is not bool [{rows}, {places}]")
        y = x.clone(memory_format=torch.contiguous_format)
        table, visible = table.contiguous(), visible.contiguous()
        tensors = native.addresses(table=table, k=k, v=v, slots=slots, visible=visible)
        attention = native.compiled().CodecAttention(**tensors, places=places)
        self.native.run(**native.addresses(x=y), rows=rows, attention=attention)
        return y


def takes_stack(layers: Sequence[Layer], heads: int) -> bool:
    """Whether `CodecStack` computes it, and not slower than products on several threads.

    Quantized weights are excluded: their products read x in fixed point, which changes how
    attention's results are rounded, and a stream must match one-shot decoding.
    """
    parts = [
        each
        for layer in layers
        for part in layer
        for each in (part if isinstance(part, tuple) else (part,))
    ]
    dense = not any(isinstance(part, QuantizedWeight) for part in parts)
    return dense and bool(layers) and len(layers[0][0][0]) % (8 * heads) == 0 and takes_parts(parts)
