"""A dense weight matrix as upstream stores it: row blocks that lie apart.

Upstream stores q/k/v and gate/up as matrices of their own, and a memory-mapped file must not be
copied to join them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.matmul.quantized_weight import nbytes


@dataclass(frozen=True)
class Weight:
    """Row blocks [N_i, K] of one matrix, and as many biases [N_i] or none."""

    blocks: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    def __getstate__(self) -> dict[str, object]:
        # What is cached about this weight is not copied.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def stack(cls, blocks: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> Weight:
        return cls(tuple(blocks), tuple(biases) or (None,) * len(blocks))

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return sum(map(len, self.blocks)), self.blocks[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read."""
        return nbytes(*self.blocks, *self.biases)

    @cached_property
    def plans(self) -> dict[Hashable, Any]:
        """How products with it are computed; `plan.py` fills it."""
        return {}

    def product(self, of_block: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """A product with the whole matrix from those with each block and its bias."""
        parts = [of_block(*pair) for pair in zip(self.blocks, self.biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def check_width(x: Tensor, columns: int) -> Tensor:
    """x, whose last dimension must be the weight's."""
    if x.shape[-1] != columns:
        raise ValueError(f"the last dimension of {list(x.shape)} is not the weight's {columns}")
    return x
