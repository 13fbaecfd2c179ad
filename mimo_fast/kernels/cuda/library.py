"""The CUDA kernels of csrc/cuda: a shared object without torch, called with raw pointers.

`setup.py` builds it where it finds nvcc. Without it, and for shapes and types that it does not
take, Triton kernels run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_fast.kernels.dispatch import ENVIRONMENT, forced
from mimo_fast.kernels.norm import RMSNorm

if TYPE_CHECKING:
    from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight

Function = Callable[..., int]
"""Of the library; it launches a kernel and returns a CUDA error."""

LIBRARY = Path(__file__).parents[2] / "libmimo_fast_cuda.so"
COMPUTE_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16)

COLUMNS = 128
"""Columns of a weight that share a scale, unless a scale is for the whole row."""

MAX_COLUMNS = 16384
"""Largest K; beyond it a tile has more scales than a block of threads loads at once."""

FUSED_ROWS = 192
"""Rows of x up to which `quantized_gemm` is worth taking. On an H100 a layer's four products
take less time than by `unpack` and torch's product at 64, 96 and 128 rows (int4), and more from 256
on (benchmarks/results/2026-11-28-h100-gemm.json)."""


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None where it was not built or does not load."""
    try:
        return declared(ctypes.CDLL(str(LIBRARY)))
    except (OSError, AttributeError):
        # A library of an older version lacks a function.
        return None


def state() -> str:
    """One line for `mimo-fast info`."""
    if library() is None:
        if LIBRARY.exists():
            return f"built, but {LIBRARY} does not load; Triton's take their place"
        return "not built (they need nvcc when mimo-fast is installed); Triton's take their place"
    line = "products of few rows with int4 and int8 weights, on GPUs from Ampere on"
    line += f"; {build_of(library())}"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if torch.cuda.get_device_capability(device) >= COMPUTE_CAPABILITY and (
            error := _probe(device)
        ):
            line += f"; not on gpu {index} (CUDA error {error}), where Triton's take their place"
    return line


def build_of(loaded: ctypes.CDLL | None) -> str:
    """What a library states of its build: compiler, architectures and those left out, and why."""
    stated = getattr(loaded, "mimo_fast_build", None)
    if stated is None:
        return "it does not state for which architectures it was built"
    stated.argtypes = []
    stated.restype = ctypes.c_char_p
    return str(stated().decode("ascii"))


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of its functions, and returns it.

    Raises:
        AttributeError: it lacks one of them.
    """
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    product = loaded.mimo_fast_quantized_mma
    product.argtypes = [*[pointer] * 8, long, *[integer] * 8, ctypes.c_float, pointer]
    unpack = loaded.mimo_fast_unpack
    unpack.argtypes = [*[pointer] * 4, *[long] * 2, *[integer] * 4, pointer]
    gemm = loaded.mimo_fast_quantized_gemm
    gemm.argtypes = [*[pointer] * 7, long, *[integer] * 8, pointer]
    tiles = loaded.mimo_fast_row_tiles
    tiles.argtypes = [*[pointer] * 9, long, *[integer] * 8, ctypes.c_float, pointer]
    choice = loaded.mimo_fast_row_tiles_choice
    choice.argtypes = [*[integer] * 7, ctypes.POINTER(ctypes.c_float)]
    loaded.mimo_fast_row_tiles_room.argtypes = [integer, integer]
    loaded.mimo_fast_row_tiles_room.restype = long
    counts = (
        loaded.mimo_fast_variants,
        loaded.mimo_fast_gemm_variants,
        loaded.mimo_fast_row_tiles_variants,
    )
    for function in counts:
        function.argtypes = []
    for function in (product, unpack, gemm, tiles, choice, *counts):
        function.restype = integer
    return loaded


@cache
def _probe(device: torch.device) -> int:
    """The CUDA error of a first product on a device; 0 for none.

    It fails where the library has no code for the device or the driver is too old.
    """
    x = torch.ones(1, COLUMNS, dtype=torch.bfloat16, device=device)
    words = torch.zeros(8, COLUMNS // 4, dtype=torch.int32, device=device)
    scales, y = (torch.ones(8, dtype=torch.bfloat16, device=device) for _ in range(2))
    tensors = x, None, words, scales, None, None, None, y
    form = COLUMNS, 1, 8, COLUMNS, 8, False, False, False, 0, 0.0
    return _launch(_library(None).mimo_fast_quantized_mma, x, tensors, form)


@cache
def _runs_on(device: torch.device) -> bool:
    if library() is None or torch.cuda.get_device_capability(device) < COMPUTE_CAPABILITY:
        return False
    return not _probe(device)


def refuses(weight: QuantizedWeight | Tensor, device: torch.device, dtype: torch.dtype) -> str:
    """Why there are no kernels for products with a weight, or "" where there are.

    They take bfloat16 and float16 activations; int4 in groups of 128, int8 by row or in those. Of
    dense weights [N, K] they take bfloat16.
    """
    return refuses_device(device) or refuses_form(weight, dtype)


def refuses_device(device: torch.device) -> str:
    """`refuses` of any weight."""
    if device.type != "cuda":
        return "x is not on a GPU"
    if forced():
        return f"{ENVIRONMENT} is set"
    if library() is None:
        return "the CUDA kernels were not built"
    return "" if _runs_on(device) else "this GPU does not run them"


def refuses_form(weight: QuantizedWeight | Tensor, dtype: torch.dtype) -> str:
    """`refuses`, on any device."""
    if isinstance(weight, Tensor):
        return _refuses_dense(weight, dtype)
    return _refuses_quantized(weight, dtype)


def _refuses_dense(weight: Tensor, dtype: torch.dtype) -> str:
    if weight.dtype != torch.bfloat16 or dtype != torch.bfloat16:
        return f"x is {dtype} and the weight {weight.dtype}, not both bfloat16"
    if weight.ndim != 2 or not weight.numel() or not weight.is_contiguous():
        return "the weight is not contiguous [N, K]"
    if weight.shape[1] % COLUMNS or weight.shape[1] > MAX_COLUMNS:
        return f"rows of {weight.shape[1]} values are no multiple of {COLUMNS} up to {MAX_COLUMNS}"
    return "" if weight.data_ptr() % 16 == 0 else "the weight is not aligned to 16 bytes"


def _refuses_quantized(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    columns = weight.shape[1]
    by_row = weight.bits == 8 and weight.group == columns and columns % COLUMNS == 0
    if weight.levels is not None:
        return "the format has a table of levels"
    if dtype not in DTYPES or dtype != weight.scales.dtype:
        return f"x is {dtype} and the scales {weight.scales.dtype}, not both bfloat16 or float16"
    if not (by_row or weight.group == COLUMNS):
        return f"groups of {weight.group}, not {COLUMNS} or int8 by row"
    if columns > MAX_COLUMNS:
        return f"rows of {columns} values are longer than {MAX_COLUMNS}"
    return "" if weight.words.data_ptr() % 16 == 0 else "the weight is not aligned to 16 bytes"


def quantized_mma(
    x: Tensor,
    weight: QuantizedWeight,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
    loaded: ctypes.CDLL | None = None,
    variant: int = 0,
) -> Tensor:
    """Product of a few rows: x [M, K] -> y, which is written; kernels/matmul has the formula.

    x has contiguous rows that start at multiples of 8 bytes; y and residual are contiguous.

    Args:
        norm: must be None for float16 x, whose range does not hold x times the norm's weight before
            the row's scale is applied.
        loaded: another build of the library than the package's.
        variant: one of its configurations, 0 for its own choice.

    Raises:
        ValueError: shapes, types, layouts or devices do not fit.
        RuntimeError: the device refused the launch.
    """
    functions = (_library(loaded).mimo_fast_quantized_mma,)
    return _normed_product(functions, x, weight, weight.bias, norm, residual, swiglu, y, variant)


def row_tiles(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
    loaded: ctypes.CDLL | None = None,
    variant: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """`quantized_mma` for more rows, with the same bits of a row; it takes room for a copy of x.

    Args:
        weight: or a dense one, bfloat16 [N, K], whose rows have the same bits in any number, too.
        bias: of a dense weight, [N].

    Raises:
        ValueError: shapes, types, layouts or devices do not fit.
        RuntimeError: the device refused the launch.
    """
    found = _library(loaded)
    if not isinstance(weight, Tensor):
        bias = weight.bias
    functions = found.mimo_fast_row_tiles, found.mimo_fast_row_tiles_room
    return _normed_product(functions, x, weight, bias, norm, residual, swiglu, y, variant)


def _normed_product(
    functions: tuple[Function, ...],
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    bias: Tensor | None,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
    variant: int,
) -> Tensor:
    """`quantized_mma` and `row_tiles`: the product, and what says how many bytes of room it takes
    for M and K, if it takes any."""
    parts: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
    if isinstance(weight, Tensor):
        if reason := refuses_form(weight, x.dtype):
            raise ValueError(f"no kernel reads the weight: {reason}")
        if bias is not None:
            _expect(bias, (len(weight),), x, "the bias")
        parts = (weight, None, None, bias)
        form: tuple[int, ...] = (*weight.shape, 16, False)
    else:
        _check_weight(weight, x)
        parts = (weight.words, weight.scales, weight.zeros, bias)
        form = _form(weight)
    _check_around(x, parts[0].device, form[:2], residual, swiglu, y)
    if norm is not None:
        _expect(norm.weight, (x.shape[1],), x, "the norm's weight")
    scale = None if norm is None else _aligned(norm.weight)
    product, *rooms = functions
    room = [x.new_empty(bytes_of(*x.shape), dtype=torch.uint8) for bytes_of in rooms]
    tensors = x, scale, *parts, residual, y, *room
    options = swiglu, x.dtype == torch.float16, variant, 0.0 if norm is None else norm.eps
    error = _launch(product, x, tensors, (x.stride(0), len(x), *form, *options))
    _check(error, f"a product of {len(x)} rows")
    return y


def row_tiles_choice(
    loaded: ctypes.CDLL, rows: int, shape: tuple[int, int], bits: int, grouped: bool, swiglu: bool
) -> tuple[int, float]:
    """The configuration that `row_tiles` takes for bfloat16, and the clock cycles that it is
    predicted to take on this device."""
    cycles = ctypes.c_float()
    place = ctypes.byref(cycles)
    chosen = loaded.mimo_fast_row_tiles_choice(rows, *shape, bits, grouped, swiglu, False, place)
    return int(chosen), cycles.value


def gemm_takes(x: Tensor) -> bool:
    """Whether `quantized_gemm` can read x [M, K] with contiguous rows.

    `refuses` says for which weights it has no kernels.
    """
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0


def quantized_gemm(
    x: Tensor,
    weight: QuantizedWeight,
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
    loaded: ctypes.CDLL | None = None,
    variant: int = 0,
) -> Tensor:
    """`quantized_mma` for many rows, without a norm.

    x and each of its rows start at a multiple of 16 bytes. Values of the weight are rounded to
    x.dtype, as `unpack` does.

    Raises:
        ValueError: shapes, types, layouts or devices do not fit.
        RuntimeError: the device refused the launch.
    """
    _check_weight(weight, x)
    _check_around(x, weight.words.device, weight.shape, residual, swiglu, y)
    tensors = x, weight.words, weight.scales, weight.zeros, weight.bias, residual, y
    form = x.stride(0), len(x), *_form(weight), swiglu, x.dtype == torch.float16, variant
    error = _launch(_library(loaded).mimo_fast_quantized_gemm, x, tensors, form)
    _check(error, f"a product of {len(x)} rows")
    return y


def unpack(
    weight: QuantizedWeight, start: int, out: Tensor, loaded: ctypes.CDLL | None = None
) -> None:
    """Unpacks rows start ... start + R - 1 of a weight into out [R, K], contiguous.

    Values, and the scales before them, are rounded to out's dtype.

    Raises:
        ValueError: shapes, types, layouts or devices do not fit, or rows are none of the weight's.
        RuntimeError: the device refused the launch.
    """
    _check_weight(weight, out)
    rows, columns = weight.shape
    fits = out.ndim == 2 and out.shape[1] == columns and out.is_contiguous()
    if not fits or not 0 <= start <= start + len(out) <= rows:
        where = f"rows {start} to {start + len(out)} of {rows} into {list(out.shape)}"
        raise ValueError(f"cannot unpack {where}, which must be contiguous [R, {columns}]")
    tensors = weight.words, weight.scales, weight.zeros, out
    form = start, len(out), *_form(weight)[1:], out.dtype == torch.float16
    error = _launch(_library(loaded).mimo_fast_unpack, out, tensors, form)
    _check(error, f"to unpack {len(out)} rows")


def _expect(
    tensor: Tensor, shape: tuple[int, ...], like: Tensor, name: str, packed: bool = True
) -> None:
    """Raises ValueError unless a tensor has this shape, and the dtype and device of another.

    packed: it must be contiguous, too; else its last dimension alone.
    """
    fits = tensor.shape == shape and tensor.dtype == like.dtype and tensor.device == like.device
    if not fits or not (tensor.is_contiguous() if packed else tensor.stride(-1) == 1):
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        wanted = f"{like.dtype} {list(shape)} on {like.device}"
        raise ValueError(f"{name} is {found}, with strides {tensor.stride()}, not {wanted}")


def _check_weight(weight: QuantizedWeight, x: Tensor) -> None:
    """Raises ValueError unless a weight's parts fit each other and x; once a weight and dtype."""
    known = ("checked", x.dtype, x.device)
    if known in weight.plans:
        return
    words, scales, zeros, bias = weight.words, weight.scales, weight.zeros, weight.bias
    whole = words.ndim == 2 and words.dtype == torch.int32 and words.is_contiguous()
    whole = whole and words.numel() > 0
    if not whole or scales.ndim != 2 or not scales.shape[1] or weight.torch_scales is not None:
        raise ValueError("words are not contiguous int32 [N, K bits / 32], or scales no matrix")
    if words.device != x.device:
        raise ValueError(f"the weight is on {words.device}, not on {x.device}")
    if reason := refuses_form(weight, x.dtype):
        raise ValueError(f"no kernel reads the weight: {reason}")
    rows, columns = weight.shape
    _expect(scales, (rows, columns // weight.group), x, "the scales")
    if zeros is not None:
        _expect(zeros, tuple(scales.shape), x.new_empty(0, dtype=torch.float16), "zeros")
    if bias is not None:
        _expect(bias, (rows,), x, "the bias")
    weight.plans[known] = None


def _check_around(
    x: Tensor,
    device: torch.device,
    shape: tuple[int, ...],
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
) -> None:
    """Raises ValueError unless x, y and the residual fit a weight of this device and shape."""
    rows, columns = shape
    if x.device != device:
        raise ValueError(f"the weight is on {device}, not on {x.device}")
    if x.ndim != 2 or (swiglu and rows % 2):
        problem = f"x is {list(x.shape)}, not [M, {columns}], or SwiGLU of {rows} rows"
        raise ValueError(problem)
    _expect(x, (len(x), columns), x, "x", packed=False)
    results = len(x), rows // 2 if swiglu else rows
    _expect(y, results, x, "y")
    if residual is not None:
        _expect(residual, results, x, "the residual")


def _form(weight: QuantizedWeight) -> tuple[int, ...]:
    """What the kernels are told of a weight: N, K, bits, whether a row has several scales, or one
    that lies as a group's does."""
    return (*weight.shape, weight.bits, weight.group == COLUMNS)


def _launch(
    function: Function, x: Tensor, tensors: Sequence[Tensor | None], options: Sequence[float]
) -> int:
    """Calls one on x's device and current stream; the CUDA error."""
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    with _current(x):
        return int(function(*addresses, *options, _stream(x)))


def _library(loaded: ctypes.CDLL | None) -> ctypes.CDLL:
    found = library() if loaded is None else loaded
    assert found is not None
    return found


def _current(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: a launch goes there, whatever its stream belongs to."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless contiguous at a multiple of 8 bytes, as the kernel reads it."""
    aligned = tensor.data_ptr() % 8 == 0 and tensor.is_contiguous()
    return tensor if aligned else tensor.clone().contiguous()


def _stream(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def _check(error: int, what: str) -> None:
    if error:
        raise RuntimeError(f"the GPU refused {what}: CUDA error {error}")
