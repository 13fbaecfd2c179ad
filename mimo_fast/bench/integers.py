"""Integer products on a CPU: the rate of its instructions, and what of it prompts reach.

The peak is the rate of the instructions by which the native kernels multiply 16-bit activations
with weights of 4 or 8 bits (csrc/cpu/integer_peak.cpp), on registers alone and as many threads as
torch uses. Of it and of a product the best of several runs counts, one after the other, since other
programs share the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.runtime.lm.transformer import TransformerWeights

ROUNDS = 2**20
"""Of eight instructions, in one run: two milliseconds."""

PEAK_RUNS, RUNS = 10, 3
PROMPT_ROWS = 64, 128, 256


@dataclass(frozen=True)
class Matrix:
    """A weight, and whether SwiGLU follows its product."""

    weight: QuantizedWeight
    swiglu: bool = False

    @property
    def values(self) -> int:
        return math.prod(self.weight.shape)


@dataclass(frozen=True)
class Rates:
    """Products a second that are reached, and that registers alone reach; seconds of one call."""

    reached: float
    peak: float
    seconds: float

    @property
    def share(self) -> float:
        return self.reached / self.peak


def integer_peak() -> float | None:
    """Products a second; None where the native kernels are not used, or have no such instructions.

    A product is that of a 16-bit activation with a weight.
    """
    if not native.available() or not native.compiled().multiply_registers(1):
        return None
    return max(_peak() for _ in range(PEAK_RUNS))


def rates(matrix: Matrix, rows: int, dtype: torch.dtype, runs: int) -> Rates:
    """Of the product of `rows` random rows with a matrix that the native kernels take."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = rows, matrix.weight.shape[1]
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    peak, seconds = 0.0, math.inf
    for _ in range(runs):
        peak = max(peak, _peak())
        began = perf_counter()
        native.quantized_matmul(x, matrix.weight, swiglu=matrix.swiglu)
        seconds = min(seconds, perf_counter() - began)
    peak = max(peak, _peak())
    return Rates(rows * matrix.values / seconds, peak, seconds)


def layer_matrices(stack: TransformerWeights) -> list[Matrix]:
    """Those of the first layer that the native kernels multiply as they are stored."""
    layer = stack.layers[0]
    found = ((layer.qkv, False), (layer.out, False), (layer.gate_up, True), (layer.down, False))
    return [
        Matrix(weight, swiglu)
        for weight, swiglu in found
        if isinstance(weight, QuantizedWeight) and native.takes_weight(weight)
    ]


def prompt_shares(
    matrices: Sequence[Matrix], dtype: torch.dtype, of_rows: Iterable[int] = PROMPT_ROWS
) -> dict[int, float]:
    """Rows of a prompt -> share of the peak that the products with all matrices reach."""
    shares = {}
    for rows in of_rows:
        found = [rates(matrix, rows, dtype, RUNS) for matrix in matrices]
        products = rows * sum(matrix.values for matrix in matrices)
        seconds, peak = sum(each.seconds for each in found), max(each.peak for each in found)
        shares[rows] = products / seconds / peak
    return shares


def _peak() -> float:
    began = perf_counter()
    return native.compiled().multiply_registers(ROUNDS) / (perf_counter() - began)
