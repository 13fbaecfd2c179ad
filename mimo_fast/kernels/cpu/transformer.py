"""A whole small transformer, or a whole patch, in one native call.

Small models spend most of their time in calls.

    Transformer.step     backbone: every layer, the append to the cache and attention; at decode
                         a position of each row, at prefill many positions of some slots
    Transformer.encode   patch encoder: every layer of N short sequences
    Product              rows times a matrix, between the transformers
    PatchDecoder         G + max delay steps, each a `Transformer.step`, the active heads, draws and
                         embeddings

Weights are read in place, float32 or quantized, so nothing is copied and a memory-mapped file stays
mapped; with a weight its adapter is read (`kernels/matmul/adapted.py`). Logits differ from those of
plain torch by the order of float32 sums; given the logits, a draw is `sample.py`'s. A row has the
same bits whatever rows are beside it. Few rows are computed on the caller's thread: below SMALL
bytes of weights, waking another takes longer than it saves. Many are divided among the threads that
it has.

CPU, float32, heads of 8 n values, widths of 8 n. Everything else runs one product at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.matmul.product import AdaptedWeight, AnyWeight, QuantizedWeight, Weight
from mimo_fast.kernels.sample import SamplerTensors

SMALL = 2**24
"""Bytes of weights up to which a transformer is computed in one call."""

Layer = tuple[Tensor, AnyWeight, AnyWeight, Tensor, AnyWeight, AnyWeight]
"""Weight of an RMSNorm, qkv, out, weight of another RMSNorm, gate and up, down."""


class Transformer:
    """A small float32 transformer that is computed in one call; weights are read in place.

    Args:
        norm: weight of the RMSNorm after the layers.
        table: of `rope_table`, for all positions.

    Raises:
        ValueError: `takes_transformer` does not hold, or weights do not fit each other.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        norm: Tensor,
        eps: float,
        table: Tensor,
        heads: int,
        kv_heads: int,
    ) -> None:
        native.expect(norm.ndim == 1, f"the norm is {list(norm.shape)}, not [D]")
        native.check_table(table, 2 * table.shape[-1])
        if not takes_transformer(layers, norm, table):
            raise ValueError("the native transformer takes small float32 models on a CPU alone")
        self._arguments = (tuple(layers), norm, eps, table, heads, kv_heads)
        head_dim = 2 * table.shape[2]
        self.dim, self._head_shape = len(norm), (kv_heads, head_dim)
        self.native = native.compiled().Transformer(
            **native.addresses(norm=norm, table=table),
            eps=eps,
            positions=table.shape[1],
            dim=len(norm),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )
        for attention_norm, qkv, out, ffn_norm, gate_up, down in layers:
            native.expect(
                attention_norm.shape == ffn_norm.shape == norm.shape, "norms are of other widths"
            )
            self.native.add_layer(
                **native.addresses(attention_norm=attention_norm, ffn_norm=ffn_norm),
                qkv=linear(qkv),
                out=linear(out),
                gate_up=linear(gate_up),
                down=linear(down),
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy reads the copied weights.
        return type(self), self._arguments

    def step(self, x: Tensor, k: Tensor, v: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
        """R new positions: x [R, D] -> normed hidden states [R, D].

        Each row attends to its slot up to its own position, once all rows have appended: positions
        of one slot that come in one call see one another as in causal attention, and have the bits
        that they have one by one.

        k, v: the cache [L, B, Hkv, S, Dh] in float32, of one layout. slots, starts int64 [R]: where
            each row appends.

        Raises:
            ValueError: shapes or types are others, or a slot is none of the cache's.
        """
        if x.ndim != 2 or not _is_rows(x, self.dim):
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not float32 [R, {self.dim}]")
        cache = native.view_cache(k, v)
        if (
            k.dtype != torch.float32
            or v.dtype != torch.float32
            or k.shape[2::2] != self._head_shape
        ):
            raise ValueError(
                f"the cache is {k.dtype} {list(k.shape)}, not float32 [layers, slots, kv_heads, "
                f"capacity, head_dim] with kv_heads and head_dim {list(self._head_shape)}"
            )
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        at = native.positions(len(x), slots, starts)
        self.native.step(**native.addresses(x=x, y=y), cache=cache, at=at)
        return y

    def encode(self, x: Tensor, causal: bool) -> Tensor:
        """Sequences that attend to themselves from position 0 on.

        x [N, T, D] -> normed hidden states [N, T, D].

        Raises:
            ValueError: x has another shape or type, or T exceeds the positions of the table.
        """
        if x.ndim != 3 or not _is_rows(x, self.dim):
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not float32 [N, T, {self.dim}]")
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        given = native.addresses(x=x, y=y)
        self.native.encode(**given, sequences=len(x), length=x.shape[1], causal=causal)
        return y


class Product:
    """Rows times a small matrix, which is read in place.

    Raises:
        ValueError: its parts do not fit each other.
    """

    def __init__(self, weight: AnyWeight) -> None:
        self.weight = weight
        self._shape = weight.shape
        self._native = linear(weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weight,)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N].

        Raises:
            ValueError: x has another width or type.
        """
        rows, columns = self._shape
        if x.ndim == 0 or not _is_rows(x, columns):
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not float32 [..., {columns}]")
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], rows)
        self._native.multiply(**native.addresses(x=x, y=y), rows=x.numel() // columns)
        return y


class PatchDecoder:
    """All steps of a patch in one call.

    Each step runs the transformer and `sample_codes`, whose embedding sum is the next input.

    Args:
        heads, embeddings: float32 [table rows, D].
        steps: `CodeStep.heads` of each step.

    Raises:
        ValueError: shapes or types are others, or a step's heads are not in the tables.
    """

    def __init__(
        self,
        transformer: Transformer,
        heads: Tensor,
        embeddings: Tensor,
        steps: Sequence[Tensor],
        channels: int,
        group_size: int,
    ) -> None:
        self._arguments = (transformer, heads, embeddings, tuple(steps), channels, group_size)
        self._shape = (channels, group_size)
        native.expect(heads.ndim == 2, f"heads are {list(heads.shape)}, not [rows, D]")
        self._dim = heads.shape[1]
        native.expect(
            takes_table(heads)
            and takes_table(embeddings)
            and heads.shape == embeddings.shape
            and self._dim == transformer.dim,
            f"heads and embeddings are not float32 [rows, {transformer.dim}]",
        )
        self._native = native.compiled().PatchDecoder(
            transformer=transformer.native,
            **native.addresses(heads=heads, embeddings=embeddings),
            table_rows=len(heads),
            channels=channels,
            group_size=group_size,
        )
        for step in steps:
            native.expect(
                step.dtype == torch.int64
                and step.ndim == 2
                and len(step) == 5
                and step.is_contiguous(),
                "a step's heads are not int64 [5, active]",
            )
            self._native.add_step(heads=native.address(step), active=step.shape[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def decode(
        self, local: Tensor, settings: SamplerTensors, seeds: Tensor, draws: Tensor
    ) -> Tensor:
        """local [R, D], settings, seeds and draws int64 of R rows -> codes int64 [R, C, G]."""
        rows = len(local)
        if local.ndim != 2 or not _is_rows(local, self._dim):
            raise ValueError(f"local is {local.dtype} {list(local.shape)}, not [R, {self._dim}]")
        if not native.fit_rows(rows, settings, seeds, draws):
            raise ValueError(f"settings, seeds and draws are not of {rows} rows")
        local, codes = (
            local.contiguous(),
            # Zeros, for a patch of which no step draws a part.
            torch.zeros(rows, *self._shape, dtype=torch.int64, device="cpu"),
        )
        self._native.decode(
            **native.addresses(local=local, codes=codes),
            settings=native.sampler_rows(settings, seeds, draws),
        )
        return codes


def takes_transformer(layers: Sequence[Layer], norm: Tensor, table: Tensor) -> bool:
    """Whether `Transformer` computes it, and not slower than products on several threads."""
    return table.shape[2] % 4 == 0 and takes_parts(
        [norm, table, *(part for layer in layers for part in layer)]
    )


def takes_parts(parts: Sequence[Tensor | AnyWeight | None]) -> bool:
    """Whether a native call may read these tensors in place, and they are small.

    An adapter does not count: a weight is computed with it as without it.
    """
    weights = (part for part in parts if part is not None and not isinstance(part, Tensor))
    bases = (part.base if isinstance(part, AdaptedWeight) else part for part in weights)
    size = sum(part.nbytes for part in bases)
    return native.available() and size <= SMALL and all(map(is_plain, parts))


def takes_table(rows: Tensor) -> bool:
    """Whether `PatchDecoder` reads heads or embeddings like these."""
    return is_plain(rows) and rows.shape[1] % 8 == 0


def is_plain(part: Tensor | AnyWeight | None) -> bool:
    """Whether native code can read it in place; a tensor that is being trained may move."""
    if part is None:
        return True
    if isinstance(part, QuantizedWeight):
        return native.takes_weight(part) and is_plain(part.bias)
    if isinstance(part, AdaptedWeight):
        each = (part.base, part.a, *(rows.b for rows in part.rows), part.factor, part.bias)
        return all(map(is_plain, each))
    if isinstance(part, Weight):
        widths = all(block.shape[1] % 8 == 0 for block in part.blocks)
        return widths and all(is_plain(each) for each in (*part.blocks, *part.biases))
    return (
        part.device.type == "cpu"
        and part.dtype == torch.float32
        and part.is_contiguous()
        and not part.requires_grad
    )


def _is_rows(x: Tensor, width: int) -> bool:
    return x.shape[-1] == width and x.dtype == torch.float32 and x.device.type == "cpu"


def linear(weight: AnyWeight) -> Any:
    """The native view of a weight, which must outlive it.

    Raises:
        ValueError: its parts do not fit each other.
    """
    native.expect(is_plain(weight), "a weight is not float32 on a CPU, contiguous and frozen")
    if isinstance(weight, AdaptedWeight):
        return _adapted_linear(weight)
    compiled = native.compiled()
    if isinstance(weight, QuantizedWeight):
        bias = weight.bias
        native.expect(
            bias is None or bias.shape == (weight.shape[0],), "the bias is not one of the rows"
        )
        return compiled.Linear.quantized(weight=native.view(weight), bias=native.address(bias))
    columns = weight.blocks[0].shape[1]
    linear = compiled.Linear(columns=columns)
    for block, bias in zip(weight.blocks, weight.biases, strict=True):
        native.expect(
            block.shape[1] == columns and (bias is None or bias.shape == (len(block),)),
            "blocks of one matrix do not fit each other",
        )
        linear.add_block(weight=block.data_ptr(), bias=native.address(bias), rows=len(block))
    return linear


def _adapted_linear(weight: AdaptedWeight) -> Any:
    made, (count, columns) = linear(weight.base), weight.shape
    a, first, rank = weight.a.blocks[0], 0, 0
    native.expect(len(weight.a.blocks) == 1 and a.shape[1] == columns, "A is not of one width")
    native.expect(sum(weight.counts) == count, "row blocks are not those of the matrix")
    for vector in (weight.factor, weight.bias):
        native.expect(vector is None or vector.shape == (count,), "a factor or bias is of no row")
    for rows in weight.rows:
        if rows.b is not None:
            b = rows.b.blocks[0]
            own = a[rank : rank + b.shape[1]]
            native.expect(
                len(rows.b.blocks) == 1 and b.shape == (rows.count, len(own)),
                "A and B of an adapter do not fit each other",
            )
            given = native.addresses(a=own, b=b)
            made.adapt(**given, rank=len(own), first=first, rows=rows.count)
            rank += len(own)
        first += rows.count
    native.expect(rank == len(a), "A has rows of no B")
    if weight.factor is not None:
        made.scale(**native.addresses(factor=weight.factor, bias=weight.bias))
    return made
