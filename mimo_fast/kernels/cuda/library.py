"""The CUDA kernels of csrc/cuda, where they were built: a shared object without torch, called with
raw pointers.

`setup.py` builds it where it finds nvcc. Without it, and for what it does not take, Triton's
kernels run.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_fast.kernels.dispatch import forced
from mimo_fast.kernels.norm import RMSNorm

if TYPE_CHECKING:
    from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight

LIBRARY = Path(__file__).parents[2] / "libmimo_fast_cuda.so"
COMPUTE_CAPABILITY = (8, 0)

COLUMNS = 128
"""Of a weight that share a scale, unless its whole row does."""


@cache
def library() -> ctypes.CDLL | None:
    """None where it was not built, or does not load."""
    try:
        return declared(ctypes.CDLL(str(LIBRARY)))
    except OSError:
        return None


def state() -> str:
    """One line for `mimo-fast info`."""
    if library() is not None:
        return "products of few rows with int4 and int8 weights, on GPUs from Ampere on"
    if LIBRARY.exists():
        return f"built, but {LIBRARY} does not load"
    return "not built (they need nvcc when mimo-fast is installed); Triton's take their place"


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions' arguments."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    product = loaded.mimo_fast_quantized_mma
    product.argtypes = [*[pointer] * 8, ctypes.c_int64, *[integer] * 6, ctypes.c_float, pointer]
    unpack = loaded.mimo_fast_unpack
    unpack.argtypes = [*[pointer] * 4, *[ctypes.c_int64] * 2, *[integer] * 3, pointer]
    product.restype = unpack.restype = integer
    return loaded


@cache
def _runs_on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= COMPUTE_CAPABILITY and library() is not None


def takes(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether there are kernels for this product: bfloat16, int4 in groups of 128, int8 by row or
    in those."""
    return x.is_cuda and not forced() and takes_form(x, weight) and _runs_on(x.device)


def takes_form(x: Tensor, weight: QuantizedWeight) -> bool:
    """`takes`, on any device."""
    columns = weight.shape[1]
    grouped = weight.group == COLUMNS or (
        weight.bits == 8 and weight.group == columns and columns % COLUMNS == 0
    )
    typed = x.dtype == weight.scales.dtype == torch.bfloat16 and weight.levels is None
    return grouped and typed and weight.words.data_ptr() % 16 == 0


def quantized_matmul(
    x: Tensor,
    weight: QuantizedWeight,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
    loaded: ctypes.CDLL | None = None,
) -> Tensor:
    """x [M, K], M small, with contiguous rows that begin at multiples of 8 bytes -> y, which is
    written; y and residual are contiguous. What it computes: qmatmul.py.

    loaded: another build of the library than the package's.

    Raises:
        RuntimeError: the device refused the launch.
    """
    rows, columns = weight.shape
    pointers = (
        x,
        None if norm is None else norm.weight,
        weight.words,
        weight.scales,
        weight.zeros,
        weight.bias,
    )
    error = _library(loaded).mimo_fast_quantized_mma(
        *map(_at, (*pointers, residual, y)),
        x.stride(0),
        len(x),
        rows,
        columns,
        weight.bits,
        _grouped(weight),
        swiglu,
        0.0 if norm is None else norm.eps,
        _stream(x),
    )
    _check(error, f"a product of {len(x)} rows")
    return y


def unpack(
    weight: QuantizedWeight, start: int, out: Tensor, loaded: ctypes.CDLL | None = None
) -> None:
    """Rows start ... start + R - 1 of a weight, rounded to bfloat16, into out [R, K], contiguous.

    Raises:
        RuntimeError: the device refused the launch.
    """
    pointers = map(_at, (weight.words, weight.scales, weight.zeros, out))
    error = _library(loaded).mimo_fast_unpack(
        *pointers, start, len(out), weight.shape[1], weight.bits, _grouped(weight), _stream(out)
    )
    _check(error, f"to unpack {len(out)} rows")


def _library(loaded: ctypes.CDLL | None) -> ctypes.CDLL:
    found = library() if loaded is None else loaded
    assert found is not None
    return found


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stream(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def _grouped(weight: QuantizedWeight) -> bool:
    """Whether a row has several scales, or one that lies as a group's does."""
    return weight.group == COLUMNS


def _check(error: int, what: str) -> None:
    if error:
        raise RuntimeError(f"the GPU refused {what}: CUDA error {error}")
