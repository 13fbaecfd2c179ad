"""`matmul` in plain torch: the norm, the product and each epilogue one after the other, every one
rounded to x.dtype. What the other implementations are compared with, and what gradients flow
through."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.matmul.adapted import AdaptedWeight, AnyWeight, adapted_product
from mimo_fast.kernels.matmul.cpu import unpacked_product
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.swiglu import swiglu as swiglu_op


def matmul_ref(
    x: Tensor,
    weight: AnyWeight,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """x [..., K] -> [..., N], or [..., N / 2] with swiglu; arguments are those of `matmul`."""
    if isinstance(weight, AdaptedWeight):
        return epilogues(adapted_product(x, weight, norm, matmul_ref), residual, swiglu)
    x = x if norm is None else norm(x)
    y = dense_product(x, weight) if isinstance(weight, Weight) else unpacked_product(x, weight)
    return epilogues(y, residual, swiglu)


def dense_product(x: Tensor, weight: Weight, *_: object) -> Tensor:
    """x [..., K] -> x W^T + b [..., N]; what else an implementation is given is not inside."""
    if len(weight.blocks) == 1:
        return F.linear(x, weight.blocks[0], weight.biases[0])
    return weight.product(lambda block, bias: F.linear(x, block, bias))


def epilogues(y: Tensor, residual: Tensor | None, swiglu: bool) -> Tensor:
    """What follows a product that has neither inside."""
    y = swiglu_op(y) if swiglu else y
    return y if residual is None else residual + y
