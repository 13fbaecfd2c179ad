"""Quantizes values: scales (and zeros) that minimise the squared error, group by group.

4 bits: for fixed integers q the best scale and zero are a least-squares line through (q, w); for
fixed scale and zero the best q is rounding. The two alternate from several starts, each the group's
range shrunk a little (which trades clipping for resolution), and the best is kept. Plain absmax is
one of the states compared, so it is never better.

8 bits: the line gains nothing; what matters is how far to shrink. Scales are compared as stored, in
bfloat16, whose steps are as wide as the differences between them.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize, pack_words
from mimo_fast.quantization.formats import Format

CHUNK, CUDA_CHUNK = 2**15, 2**24
"""Values searched at once. On a CPU their copies stay in a core's cache, and each core takes its
own chunks: torch does not split work this small.
"""

INT4_STARTS, INT4_ROUNDS = (1.0, 0.88), 3
"""Fractions of the range to start from, corrections after each; more gain less than 1%."""

INT8_FRACTIONS = (1.0, 0.985, 0.97, 0.955, 0.94)
"""Fractions of the range; the best of 129 errs at most 0.4% less by rows, 4% by groups of 128."""

ZERO_LIMIT = 24.0
"""Largest zero, for fits that overshoot the range of q: float16 resolves 1/64 of a step here."""

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Levels of nf4, quantiles of a normal distribution (https://arxiv.org/abs/2305.14314, app. E)."""

Searched = tuple[Tensor, Tensor, Tensor | None]
"""q as non-negative offsets [R, group], scale [R, 1], zero [R, 1] or none."""

Search = Callable[[Tensor], Searched]


def quantize(
    weight: Tensor,
    chosen: Format,
    bias: Tensor | None = None,
    name: str = "a matrix to quantize",
) -> QuantizedWeight:
    """weight [N, K] of any floating dtype -> its quantized form, on the same device, in row chunks.

    name: what errors call it.

    Raises:
        ValueError: K is not a multiple of the group, or values are not finite.
    """
    columns = weight.shape[1]
    group = chosen.group or columns
    if columns % group or columns % 32:
        problem = f"a matrix of {columns} columns does not split into groups of {group}"
        raise ValueError(f"{problem}: leave it dense")
    int4 = _symmetric if chosen.symmetric else _asymmetric
    search: dict[str, Search] = {"int4": int4, "int8": _int8, "nf4": _nf4}

    def convert(start: int, end: int) -> tuple[Tensor, ...]:
        values = weight[start:end].float().reshape(-1, group)
        if not values.isfinite().all():
            problem = f"{name} holds values that are not finite"
            raise ValueError(f"{problem}: load an intact copy of the checkpoint")
        q, *grid = search[chosen.kind](values)
        words = pack_words(q.view(-1, columns), chosen.bits, group)
        return words, *(part.view(len(words), -1) for part in grid if part is not None)

    chunks = zip(*_map_rows(convert, weight), strict=True)
    words, scales, *zeros = map(torch.cat, chunks)
    return QuantizedWeight(
        words=words,
        scales=scales,
        zeros=zeros[0] if zeros else None,
        bias=bias,
        bits=chosen.bits,
        levels=torch.tensor(NF4_LEVELS, device=weight.device, dtype=torch.float32)
        if chosen.kind == "nf4"
        else None,
    )


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """|w - dequantized| / |w|, Frobenius norms."""

    def squares(start: int, end: int) -> tuple[Tensor, Tensor]:
        values = weight[start:end].float()
        return (dequantize(quantized, start, end) - values).square().sum(), values.square().sum()

    chunks = zip(*_map_rows(squares, weight), strict=True)
    error, norm = (sum(map(float, parts)) for parts in chunks)
    return (error / norm) ** 0.5 if norm else 0.0


Result = TypeVar("Result")


def _map_rows(function: Callable[[int, int], Result], weight: Tensor) -> list[Result]:
    """function(start, end) of each chunk of rows, in order; on a CPU on torch's threads."""
    step = max(1, (CUDA_CHUNK if weight.is_cuda else CHUNK) // weight.shape[1])
    starts = range(0, len(weight), step)
    ends = [min(start + step, len(weight)) for start in starts]
    threads = 1 if weight.is_cuda else torch.get_num_threads()
    if threads == 1:
        return list(map(function, starts, ends))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, starts, ends))


def _asymmetric(values: Tensor) -> Searched:
    """w = scale (q - zero), q in -8 ... 7; the range includes 0, which stays nearly exact."""
    low = values.amin(1, keepdim=True).clamp_(max=0)
    high = values.amax(1, keepdim=True).clamp_(min=0)
    size, total = values.shape[1], values.sum(1, keepdim=True)
    energy = values.square().sum(1, keepdim=True)
    best_scale = (high - low) / 15
    best_zero = torch.zeros_like(best_scale)
    best_error = torch.full_like(best_scale, torch.inf)
    q, product = torch.empty_like(values), torch.empty_like(values)
    for start in INT4_STARTS:
        scale = (high - low) * (start / 15)
        zero = -0.5 - (high + low) / 2 * _inverse(scale)
        for _ in range(INT4_ROUNDS + 1):
            torch.addcmul(zero, values, _inverse(scale), out=q).round_().clamp_(-8, 7)
            q_sum = q.sum(1, keepdim=True)
            cross = torch.mul(q, values, out=product).sum(1, keepdim=True)
            square = torch.mul(q, q, out=product).sum(1, keepdim=True)
            error = energy - 2 * scale * (cross - zero * total)
            error += scale.square() * (square - 2 * zero * q_sum + size * zero.square())
            better = error < best_error
            for kept, new in ((best_error, error), (best_scale, scale), (best_zero, zero)):
                torch.where(better, new, kept, out=kept)
            spread = square - q_sum.square() / size
            slope = (cross - q_sum * total / size) / spread.clamp(min=0.5)
            scale = torch.where(spread > 0, slope, scale).clamp_(min=0)
            zero = (q_sum - total * _inverse(scale)).div_(size).clamp_(-ZERO_LIMIT, ZERO_LIMIT)
    scale, zero = best_scale.bfloat16(), best_zero.half()
    torch.addcmul(zero.float(), values, _inverse(scale.float()), out=q).round_().clamp_(-8, 7)
    return q.add_(8).to(torch.uint8), scale, zero


def _symmetric(values: Tensor) -> Searched:
    """w = scale q, q in -8 ... 7."""
    energy = values.square().sum(1, keepdim=True)
    best_scale = _widest(values) / 8
    best_error = torch.full_like(best_scale, torch.inf)
    q, product = torch.empty_like(values), torch.empty_like(values)
    for start in INT4_STARTS:
        scale = _widest(values) * (start / 8)
        for _ in range(INT4_ROUNDS + 1):
            torch.mul(values, _inverse(scale), out=q).round_().clamp_(-8, 7)
            cross = torch.mul(q, values, out=product).sum(1, keepdim=True)
            square = torch.mul(q, q, out=product).sum(1, keepdim=True)
            error = energy - 2 * scale * cross + scale.square() * square
            better = error < best_error
            torch.where(better, error, best_error, out=best_error)
            torch.where(better, scale, best_scale, out=best_scale)
            scale = torch.where(square > 0, cross / square.clamp(min=1), scale)
    scale = best_scale.bfloat16()
    torch.mul(values, _inverse(scale.float()), out=q).round_().clamp_(-8, 7)
    return q.add_(8).to(torch.uint8), scale, None


def _int8(values: Tensor) -> Searched:
    """w = scale q, q in -128 ... 127."""
    widest = _widest(values)
    best_scale, best_error = widest / 128, torch.full_like(widest, torch.inf)
    exact, q = torch.empty_like(values), torch.empty_like(values)
    for fraction in INT8_FRACTIONS:
        scale = (widest * (fraction / 128)).bfloat16().float()
        torch.mul(values, _inverse(scale), out=exact)
        torch.round(exact, out=q).clamp_(-128, 127).sub_(exact)
        error = torch.linalg.vector_norm(q, dim=1, keepdim=True) * scale.abs()
        better = error < best_error
        torch.where(better, error, best_error, out=best_error)
        torch.where(better, scale, best_scale, out=best_scale)
    torch.mul(values, _inverse(best_scale), out=q).round_().clamp_(-128, 127)
    return q.add_(128).to(torch.uint8), best_scale.bfloat16(), None


def _widest(values: Tensor) -> Tensor:
    """Largest magnitude of each group, signed to lie on the negative, longer side of q."""
    low, high = values.aminmax(dim=1, keepdim=True)
    return torch.where(high >= -low, -high, -low)


def _nf4(values: Tensor) -> Searched:
    """The nearest of 16 levels times the group's largest magnitude: as published, no search."""
    levels = torch.tensor(NF4_LEVELS, device=values.device, dtype=torch.float32)
    scale = values.abs().amax(1, keepdim=True)
    between = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values * _inverse(scale), between).to(torch.uint8), scale, None


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where a group is all zero or too small to invert."""
    return torch.where(scale.abs() < 1e-30, 0.0, 1 / scale)
