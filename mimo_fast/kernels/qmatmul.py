"""Matrix product with a stored weight: y = x W^T + b.

A `Weight` is one logical matrix [N, K] kept as row blocks, because upstream stores q/k/v and gate/up apart and a
memory-mapped file must not be copied to join them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """Row blocks [N_i, K] of one matrix, and as many biases [N_i] or none."""

    blocks: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @classmethod
    def stack(cls, blocks: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> "Weight":
        return cls(tuple(blocks), tuple(biases) or (None,) * len(blocks))

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read."""
        return sum(t.numel() * t.element_size() for t in (*self.blocks, *self.biases) if t is not None)


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x [..., K] -> [..., N], accumulated in float32, rounded once to x.dtype."""
    parts = [F.linear(x, block, bias) for block, bias in zip(weight.blocks, weight.biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
