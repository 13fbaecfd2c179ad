"""When a fast implementation of an op is accepted: one rule for tests and for measurements.

    float32                error at most 1e-5 of the largest exact value
    float16, bfloat16      error at most twice that of the same op in eager torch of that dtype
    int8                   at most one level off, in at most 1% of the values: rounding ties
    other integers, bool   equal
    codes of an RVQ search equal up to a frame's first near-tie: two distances that differ by less
                           than 1e-5 relative

"Exact" is the op in float32 on the same inputs. NaN and infinity are never accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_BOUND = 1e-5
"""Tolerance in float32, relative to the largest exact value."""

EAGER_FACTOR = 2
NEAR_TIE = 1e-5
LEVELS_OFF = 0.01
"""Share of int8 values that may be one level off."""


@dataclass(frozen=True)
class Accuracy:
    """The largest error of an output, and its bound.

    relative: the error over the largest exact value.
    """

    error: float
    bound: float
    relative: float

    @property
    def accepted(self) -> bool:
        # Written so that NaN fails.
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"error {self.error:.3g}, bound {self.bound:.3g}"


REFUSED = float("inf")


def accuracy(got: Tensor, eager: Tensor, exact: Tensor) -> Accuracy:
    """Accuracy of one output.

    Args:
        eager: of plain torch on the same inputs, in got's dtype.
        exact: in float32 or wider; for integers the same as eager.
    """
    if got.shape != exact.shape or got.dtype != eager.dtype:
        return Accuracy(REFUSED, 0.0, REFUSED)
    if not got.numel():
        return Accuracy(0.0, 0.0, 0.0)
    if got.dtype == torch.int8:
        off = (got.int() - eager.int()).abs()
        share = float((off > 0).float().mean())
        return Accuracy(share if int(off.max()) <= 1 else REFUSED, LEVELS_OFF, share)
    if not got.is_floating_point():
        wrong = float((got != eager).float().mean())
        return Accuracy(wrong, 0.0, wrong)
    size, error = float(exact.abs().max()), REFUSED
    if bool(got.isfinite().all()):
        error = float((got.to(exact.dtype) - exact).abs().max())
    bound = FLOAT32_BOUND * size
    if got.dtype != torch.float32:
        bound = EAGER_FACTOR * float((eager.to(exact.dtype) - exact).abs().max())
    return Accuracy(error, bound, error / size if size else error)


def worst(got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> Accuracy:
    """The output of an op that is furthest beyond its bound, or nearest to it.

    Raises:
        ValueError: there are not as many outputs of each.
    """
    each = [accuracy(*outputs) for outputs in zip(got, eager, exact, strict=True)]
    return max(each, key=lambda a: (not a.accepted, a.error / a.bound if a.bound else a.error))


def compare_codes(
    x: Tensor, codebooks: Sequence[Tensor], got: Tensor, want: Tensor
) -> tuple[int, int]:
    """Number of frames that differ wrongly, and number that differ by a near-tie.

    Compares two searches' codes [Q, T] of frames x [T, D].
    """
    residual = x.double()
    same = torch.ones(len(x), dtype=torch.bool, device=x.device)
    wrong = torch.zeros_like(same)
    for mine, theirs, book in zip(got, want, codebooks, strict=True):
        wide, inside = book.double(), (mine >= 0) & (mine < len(book))
        chosen = mine.clamp(0, len(book) - 1)
        first, second = ((residual - wide[index]).square().sum(-1) for index in (chosen, theirs))
        near = inside & ((first - second).abs() < NEAR_TIE * second)
        wrong |= same & (mine != theirs) & ~near | ~inside
        same &= mine == theirs
        residual = residual - wide[theirs]
    return int(wrong.sum()), int((~same & ~wrong).sum())
