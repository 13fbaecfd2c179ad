"""Matrix product with a stored weight, dense or quantized: y = x W^T + b, and what a layer does
around it at once.

    plain            y = x W^T + b
    norm=n           y = (x / sqrt(mean(x^2) + eps) * n) W^T + b       in place of the plain product
    swiglu=True      y = silu(gate) * up       W has the rows of gate, then those of up
    residual=r       y = r + the above

Shapes: x [..., K]; W [N, K]; b [N]; n [K]; y and r [..., N], or [..., N / 2] with swiglu. Products
are accumulated in float32.

A `Weight` is dense: row blocks, because upstream stores q/k/v and gate/up apart and a memory-mapped
file must not be copied to join them. A `QuantizedWeight` is one joined matrix;
`quantized_weight.py` has its layout. Bytes of a product: those of the weight, once, plus x, n, r
and y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.kernels.matmul.cpu import (
    check_width,
    quantized_product,
    unpacked_product,
    widened_product,
    widens,
)
from mimo_fast.kernels.matmul.launch import (
    GEMV_ROWS,
    dense_gemv,
    fits_quantized,
    fused_many,
    fused_matmul,
    fuses_norm,
    most_rows,
    quantized_matmul,
    unpacked_matmul,
)
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, nbytes
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.swiglu import swiglu as swiglu_op


@dataclass(frozen=True)
class Weight:
    """Row blocks [N_i, K] of one matrix, and as many biases [N_i] or none."""

    blocks: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @classmethod
    def stack(cls, blocks: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> Weight:
        return cls(tuple(blocks), tuple(biases) or (None,) * len(blocks))

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read."""
        return nbytes(*self.blocks, *self.biases)


def matmul(
    x: Tensor,
    weight: Weight | QuantizedWeight,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """x [..., K], normed first by `norm` -> [..., N], or [..., N / 2] with swiglu; residual is
    shaped as the result."""
    if not use_triton(x):
        if (
            isinstance(weight, QuantizedWeight)
            and not x.requires_grad
            and native.takes_weight(weight)
        ):
            return native.quantized_matmul(check_width(x, weight), weight, norm, residual, swiglu)
        return _plain(x, weight, quantized_product, norm, residual, swiglu)
    if isinstance(weight, QuantizedWeight):
        if fits_quantized(weight):
            return _quantized(x, weight, norm, residual, swiglu)
    elif 0 < x.numel() <= GEMV_ROWS * x.shape[-1]:
        if len(weight.blocks) == 1:
            return dense_gemv(x, weight.blocks[0], weight.biases[0], norm, residual, swiglu)
        pairs = zip(weight.blocks, weight.biases, strict=True)
        parts = [dense_gemv(x, *pair, norm, None, False) for pair in pairs]
        return _epilogues(torch.cat(parts, dim=-1), residual, swiglu)
    return matmul_ref(x, weight, norm=norm, residual=residual, swiglu=swiglu)


def _quantized(
    x: Tensor, weight: QuantizedWeight, norm: RMSNorm | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    many = x.numel() > most_rows(x, weight) * x.shape[-1]
    if norm is not None and (many or not fuses_norm(x, weight)):
        x, norm = norm(x), None
    if not many:
        return quantized_matmul(x, weight, norm, residual, swiglu)
    if fused_many(x, weight):
        return fused_matmul(x, weight, residual, swiglu)
    y = unpacked_matmul(x, weight, None if swiglu else residual)
    return _epilogues(y, residual, swiglu) if swiglu else y


def matmul_ref(
    x: Tensor,
    weight: Weight | QuantizedWeight,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """The norm, the product and each epilogue one after the other, every one rounded to x.dtype."""
    return _plain(x, weight, unpacked_product, norm, residual, swiglu)


def _plain(
    x: Tensor,
    weight: Weight | QuantizedWeight,
    quantized: Callable[[Tensor, QuantizedWeight], Tensor],
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    x = x if norm is None else norm(x)
    y = _dense_product(x, weight) if isinstance(weight, Weight) else quantized(x, weight)
    return _epilogues(y, residual, swiglu)


def _epilogues(y: Tensor, residual: Tensor | None, swiglu: bool) -> Tensor:
    y = swiglu_op(y) if swiglu else y
    return y if residual is None else residual + y


def _dense_product(x: Tensor, weight: Weight) -> Tensor:
    linear = widened_product if widens(x) and not x.requires_grad else F.linear
    parts = [
        linear(x, block, bias) for block, bias in zip(weight.blocks, weight.biases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def qmatmul_bytes(
    rows: int,
    weight: Weight | QuantizedWeight,
    outputs: int,
    itemsize: int,
    *,
    norm: bool = False,
    residual: bool = False,
) -> int:
    """Bytes that must move for M rows of x: the weights once, x and the residual in, y [M, outputs]
    out."""
    columns = weight.blocks[0].shape[1] if isinstance(weight, Weight) else weight.shape[1]
    activations = rows * (columns + (2 if residual else 1) * outputs) + (columns if norm else 0)
    return weight.nbytes + activations * itemsize
