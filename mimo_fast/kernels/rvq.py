"""Residual vector quantization with Euclidean codebooks, in IEEE float32.

    encode: r_0 = x;  i_q = argmin_j |r_q - e_qj|^2 (first index on ties);  r_{q+1} = r_q - e_q[i_q]
    decode: sum_q e_q[i_q]

The distance is expanded as |r|^2 - 2 r.e + |e|^2 in upstream's order of operations (`EuclideanCodebook.quantize`),
so that near-ties fall on the same side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rvq_encode(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """x [T, D] float32, codebooks [V_q, D] float32 -> codes [Q, T] int64."""
    residual, codes = x, []
    for codebook in codebooks:
        norms = codebook.square().sum(-1)
        distance = residual.square().sum(-1, keepdim=True) - 2 * residual @ codebook.T + norms
        codes.append(distance.argmin(-1))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes) if codes else torch.empty(0, len(x), dtype=torch.int64, device=x.device)


def rvq_decode(codes: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """codes [Q, T], at most as many rows as codebooks -> [T, D] float32."""
    total = codebooks[0][codes[0]]
    for indices, codebook in zip(codes[1:], codebooks[1:], strict=False):
        total = total + codebook[indices]
    return total
