"""Tables of the persistent kernel for layers whose rows are those of streams.

A launch has `stream_rows` neighbouring rows a stream; weights are dense. Such a launch has no other
phases than these:

    RingTables     new positions, which attend to a ring; up to MOST_STREAM_ROWS together, for which
                   weights are read once (csrc/cuda/engine/codec.cuh)
    FrameTables    any number of rows, in groups of up to MOST_STREAM_ROWS, which attend to those
                   near them (csrc/cuda/engine/frames.cuh)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.kernels.cuda.engine import Operation, Order, Phase, Tables, Vector, _aligned
from mimo_fast.kernels.matmul.product import AnyWeight

MOST_STREAM_ROWS = 32
RING_HEAD, FRAME_HEAD = 64, 16
"""Values of a head."""


@dataclass(frozen=True)
class LayerNorm:
    """weight and bias [D]; eps is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class StreamTables(Tables):
    """Phases of the rows of streams; a method's vector or name is as in `Tables`.

    Args:
        heads: of `head_dim` values.
    """

    most_rows = MOST_STREAM_ROWS
    attends: Operation
    head_dim: int

    def __init__(self, dtype: torch.dtype, blocks: int, heads: int) -> None:
        super().__init__(dtype, blocks)
        self.set(heads=heads, kv_heads=heads, head_dim=self.head_dim)

    def product_of_rows(
        self,
        weight: AnyWeight,
        x: Vector | str,
        *,
        norm: LayerNorm | None = None,
        residual: Vector | str | None = None,
        gelu: bool = False,
    ) -> Vector:
        """A product: layer_norm(x) W^T + b, its GELU, and the residual added.

        x after the norm, and what GELU reads, are rounded as if they were results of their own.
        """
        to = self.vector(weight.shape[0])
        self._product_of_rows(weight, x, to, norm, residual, gelu)
        return to

    def deliver_rows(
        self, weight: AnyWeight, x: Vector, output: str, *, residual: Vector | str | None = None
    ) -> None:
        """x W^T + b and the residual as an output [rows, N], which no phase reads."""
        phase = self._product_of_rows(weight, x, None, None, residual, False)
        phase.output = self.pointer(output)

    def _product_of_rows(
        self,
        weight: AnyWeight,
        x: Vector | str,
        to: Vector | None,
        norm: LayerNorm | None,
        residual: Vector | str | None,
        gelu: bool,
    ) -> Phase:
        matrix = self._matrix(weight, Order.WHOLE, 0)
        phase = self._phase(Operation.PRODUCT_OF_ROWS, x, matrix.k, to, matrix.n, residual)
        phase.gelu = gelu
        if norm is not None:
            phase.layer_norm, phase.layer_norm_bias = (
                self.keep(_aligned(each)) for each in (norm.weight, norm.bias)
            )
            phase.eps = norm.eps
            self.least_x = max(self.least_x, matrix.k)
        self._add_product(phase, matrix, weight)
        return phase

    def attend(self, qkv: Vector, layer: int) -> Vector:  # type: ignore[override]
        """Attention of each stream's rows."""
        to = self.vector(self.fields["heads"] * self.head_dim)
        phase = self._phase(self.attends, qkv, qkv.columns, to, to.columns)
        phase.layer = layer
        self._add(phase)
        return to


class RingTables(StreamTables):
    """Rows attend to rings and to one another.

    Args:
        context: positions before its own that a position sees.
    """

    attends, head_dim = Operation.ATTEND_RING, RING_HEAD

    def __init__(self, dtype: torch.dtype, blocks: int, heads: int, context: int) -> None:
        super().__init__(dtype, blocks, heads)
        self.set(context=context)


class FrameTables(StreamTables):
    """Rows attend to those near them.

    Args:
        layers: whose keys and values are kept.
        window: rows before and after its own that a row sees.
        columns: of all inputs and outputs.
    """

    attends, head_dim = Operation.ATTEND_FRAMES, FRAME_HEAD

    def __init__(
        self,
        dtype: torch.dtype,
        heads: int,
        layers: int,
        window: tuple[int, int],
        columns: int,
    ) -> None:
        # A group has as many blocks as there are groups for: tiles of a product go from its first.
        super().__init__(dtype, 1, heads)
        context, ahead = window
        self.set(context=context, ahead=ahead, layers=layers, pointer_columns=columns)
