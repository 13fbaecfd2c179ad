"""A matrix with an adapter of low rank beside it; the matrix itself is read as it is stored.

    y = (x W^T + B (A x)) f + b

W [N, K] is dense or quantized and shared with the model that has no adapter. A [R, K] has the rows
of the adapters of all row blocks of W, r each (q, k and v, or gate and up, are one W); B of a block
of n rows is [n, r], with the adapter's scale in it. f [N] is DoRA's m / |W + B A| of each output,
else left out. The norm comes before, SwiGLU and the residual after it, as in a product without an
adapter.

Beside the bytes of W a product reads R K values of A and the n r of each B: of r = 64 and a block
of 4096 by 4096 in bfloat16 1 MB beside 33.6 MB, or beside 8.7 MB in int4.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, nbytes
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.norm import RMSNorm

RANKS = 8
"""Ranks are padded with zeros to a multiple of this, which whole vectors and tiles take."""

StoredWeight = Weight | QuantizedWeight
"""A matrix as a checkpoint has it."""


@dataclass(frozen=True)
class Rows:
    """A block of rows of W, as many as it says, and B of these [n, r]; None where nothing is added
    to them."""

    count: int
    b: Weight | None


@dataclass(frozen=True)
class AdaptedWeight:
    """W, and what an adapter makes of products with it.

    Args:
        base: W; it has the bias where there is no factor.
        a: A [R, K], of the blocks that have a B, in their order.
        rows: The row blocks of W, all of them.
        factor: f float32 [N]; None for 1.
        bias: b [N], which comes after the factor; None without a factor or a bias.
    """

    base: StoredWeight
    a: Weight
    rows: tuple[Rows, ...]
    factor: Tensor | None = None
    bias: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        # What is cached about this weight is not copied.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.base.shape

    @property
    def counts(self) -> list[int]:
        """Rows of each block."""
        return [rows.count for rows in self.rows]

    @property
    def added_nbytes(self) -> int:
        """Bytes that one product must read beside those of W."""
        parts = (self.a, *(rows.b for rows in self.rows))
        beside = sum(part.nbytes for part in parts if part is not None)
        return beside + nbytes(self.factor, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read."""
        return self.base.nbytes + self.added_nbytes

    @cached_property
    def plans(self) -> dict[Hashable, Any]:
        """How products with it are computed; `plan.py` fills it."""
        return {}


AnyWeight = StoredWeight | AdaptedWeight


class StoredProduct(Protocol):
    """Products with a weight as it is stored: x [..., K], normed first -> [..., N]."""

    def __call__(
        self,
        x: Tensor,
        weight: StoredWeight,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor: ...


def adapted_product(
    x: Tensor, weight: AdaptedWeight, norm: RMSNorm | None, product: StoredProduct
) -> Tensor:
    """x [..., K], normed first by `norm` -> [..., N], by products with W, A and each B.

    Each is rounded to x.dtype as it is alone; factor and bias are applied in float32, and rounded
    once.
    """
    y, u = product(x, weight.base, norm=norm), product(x, weight.a, norm=norm)
    if len(weight.rows) == 1:
        (rows,) = weight.rows
        y = y if rows.b is None else product(u, rows.b, residual=y)
    else:
        parts, rank = [], 0
        for rows, part in zip(weight.rows, y.split(weight.counts, dim=-1), strict=True):
            if rows.b is not None:
                own = u[..., rank : rank + rows.b.shape[1]].contiguous()
                part, rank = part + product(own, rows.b), rank + rows.b.shape[1]
            parts.append(part)
        y = torch.cat(parts, dim=-1)
    if weight.factor is None:
        return y
    wide = y * weight.factor
    return (wide if weight.bias is None else wide + weight.bias).to(y.dtype)


def padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [n, r] with rows and columns of zeros up to a rank of whole RANKS."""
    more = -len(a) % RANKS
    if not more:
        return a, b
    return torch.cat((a, a.new_zeros(more, a.shape[1]))), torch.cat(
        (b, b.new_zeros(len(b), more)), dim=1
    )


def joined(rows: Sequence[Rows]) -> tuple[Rows, ...]:
    """Row blocks as one, whose B has those of the blocks along its diagonal: one launch for all."""
    like = next(part.b.blocks[0] for part in rows if part.b is not None)
    each = [like.new_zeros(part.count, 0) if part.b is None else part.b.blocks[0] for part in rows]
    whole = torch.block_diag(*each)
    return (Rows(len(whole), Weight.stack([whole])),)
