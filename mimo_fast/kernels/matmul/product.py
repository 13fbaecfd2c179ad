"""Matrix product with a stored weight, dense or quantized: y = x W^T + b, and what a layer does
around it at once.

    plain            y = x W^T + b
    norm=n           y = (x / sqrt(mean(x^2) + eps) * n) W^T + b       in place of the plain product
    swiglu=True      y = silu(gate) * up       W has the rows of gate, then those of up
    residual=r       y = r + the above

Shapes: x [..., K]; W [N, K]; b [N]; n [K]; y and r [..., N], or [..., N / 2] with swiglu. Products
are accumulated in float32.

A `Weight` is dense, in row blocks; a `QuantizedWeight` is one joined matrix, whose layout
`quantized_weight.py` has; an `AdaptedWeight` is either with an adapter beside it (`adapted.py`).
Which kernel computes a product: `plan.py`. Bytes of a product: those of
the weight, once, plus x, n, r and y.
"""

from __future__ import annotations

from torch import Tensor

from mimo_fast.kernels.matmul.adapted import AdaptedWeight, AnyWeight, adapted_product
from mimo_fast.kernels.matmul.plan import plan
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.matmul.reference import epilogues, matmul_ref
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.norm import RMSNorm

__all__ = [
    "AdaptedWeight",
    "AnyWeight",
    "QuantizedWeight",
    "Weight",
    "matmul",
    "matmul_by_part",
    "matmul_ref",
    "qmatmul_bytes",
]


def matmul(
    x: Tensor,
    weight: AnyWeight,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """x [..., K], normed first by `norm` -> [..., N], or [..., N / 2] with swiglu; residual is
    shaped as the result."""
    if isinstance(weight, AdaptedWeight):
        return epilogues(adapted_product(x, weight, norm, matmul), residual, swiglu)
    made = plan(weight, x.device, x.dtype, x.requires_grad)
    return made(x, weight, norm, residual, swiglu)


def matmul_by_part(
    x: Tensor,
    weight: AnyWeight,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """`matmul` of x [N, T, K], whose parts [T, K] have the bits that they have alone.

    A library may choose the order of a row's sums by the number of rows. Where an implementation
    does not, all rows are computed at once; a weight is unpacked once for all parts.
    """
    if isinstance(weight, AdaptedWeight):
        return epilogues(adapted_product(x, weight, norm, matmul_by_part), residual, swiglu)
    made = plan(weight, x.device, x.dtype, x.requires_grad)
    return made.by_part(x, weight, norm, residual, swiglu)


def qmatmul_bytes(
    rows: int,
    weight: AnyWeight,
    outputs: int,
    itemsize: int,
    *,
    norm: bool = False,
    residual: bool = False,
) -> int:
    """Bytes that must move for M rows of x: the weights once, x and the residual in, y [M, outputs]
    out."""
    columns = weight.shape[1]
    activations = rows * (columns + (2 if residual else 1) * outputs) + (columns if norm else 0)
    return weight.nbytes + activations * itemsize
