"""Launches of the GPU kernels of `matmul`, with which tiles; and the cases to compile.

Every launcher takes (x, weight, norm, residual, swiglu); `plan.py` has which of them runs when, and
what of these is inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.dispatch import (
    SPILLS,
    TRITON,
    Case,
    early_launch,
    next_power_of_2,
    pointers,
)
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.matmul.triton_kernels import (
    dense_gemv_kernel,
    quantized_dot_kernel,
    quantized_gemv_kernel,
    unpack_kernel,
)
from mimo_fast.kernels.matmul.weight import Weight, check_width
from mimo_fast.kernels.norm import RMSNorm

GROUPS = (32, 64, 128)
GEMV_ROWS = 4
GEMV_WARPS = 4
TABLES_FIT = not SPILLS
"""Whether gemv takes a table of levels. Where it does not, dot takes few rows as well."""

SMALL_N = 3072
"""Up to here a program takes 4 rows of the weight instead of 8, so that there are programs for
every SM."""

NORMED_ROWS = 64
"""Rows up to which a quantized product norms what it reads: they are one tile, so a program reads
all of x anyway."""

DOT_TILES = ((16, (16, 32, 64, 4)), (NORMED_ROWS, (64, 32, 32, 8)))
"""(largest M, (BLOCK_M, BLOCK_N, BLOCK_W, warps)). Larger tiles spill on sm_80, or on sm_120 with a
norm inside."""

UNPACKED_AT_ONCE = 2**26
"""Values that are unpacked at a time for a product of many rows: 128 MB. The fewer launches, the
less a host delays them, and no smaller piece stays in a cache until it is multiplied."""

UNPACK_TILE = (8, 128, 4)
"""Rows, words and warps of a program that unpacks."""


def cuda_mma(
    x: Tensor, weight: QuantizedWeight, norm: RMSNorm | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """x [..., K], of few rows, by csrc/cuda/quantized_mma.cu; no norm in float16."""
    return _by_units(cuda.quantized_mma, x, weight, norm, residual, swiglu)


def cuda_tiles(
    x: Tensor, weight: QuantizedWeight, norm: RMSNorm | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """x [..., K], of some rows, by csrc/cuda/row_tiles.cu, with the bits of `cuda_mma`."""
    return _by_units(cuda.row_tiles, x, weight, norm, residual, swiglu)


def _by_units(
    launch: Callable[..., Any],
    x: Tensor,
    weight: QuantizedWeight,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """By either of the CUDA kernels that sum in the order of units."""
    flat, y, residual = _prepare(x, *weight.shape, norm, residual, swiglu)
    if y.numel():
        launch(flat, weight, norm, residual, swiglu, _matrix(y))
    return y


def cuda_dense_tiles(
    x: Tensor, weight: Weight, norm: RMSNorm | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """x [..., K], of up to some rows, a weight of one block; by csrc/cuda/row_tiles.cu."""
    (block,), (bias,) = weight.blocks, weight.biases
    rows, columns = block.shape
    flat, y, residual = _prepare(x, rows, columns, norm, residual, swiglu)
    if y.numel():
        cuda.row_tiles(flat, block, norm, residual, swiglu, _matrix(y), bias=bias)
    return y


def cuda_fused(
    x: Tensor, weight: QuantizedWeight, _norm: None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """x [..., K], of any number of rows, by csrc/cuda/quantized_gemm.cu: the weight is unpacked as
    it is multiplied."""
    flat, y, residual = _prepare(x, *weight.shape, None, residual, swiglu)
    if y.numel():
        flat = flat if cuda.gemm_takes(flat) else flat.clone()
        cuda.quantized_gemm(flat, weight, residual, swiglu, _matrix(y))
    return y


def quantized_gemv(
    x: Tensor,
    weight: QuantizedWeight,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """x [..., K] of at most GEMV_ROWS rows."""
    flat, y, residual = _prepare(x, *weight.shape, norm, residual, swiglu, out)
    if not y.numel():
        return y
    (rows, _), words = weight.shape, weight.words.shape[1]
    block_n = gemv_block_n(len(flat), rows, weight.levels is not None)
    quantized_gemv_kernel[(-(-rows // block_n),)](
        **_around(flat, norm, weight.bias, residual, swiglu, y),
        **_packed(weight),
        N=rows,
        GROUPED=weight.group in GROUPS,
        BLOCK_N=block_n,
        BLOCK_W=gemv_block_w(words, weight.bits, math.gcd(128, weight.group)),
        num_warps=GEMV_WARPS,
    )
    return y


def quantized_dot(
    x: Tensor,
    weight: QuantizedWeight,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """x [..., K] of at most NORMED_ROWS rows, on tensor cores.

    The kernel rounds x times the norm's weight to x.dtype before it knows the row's scale: float16
    has no range for that.
    """
    flat, y, residual = _prepare(x, *weight.shape, norm, residual, swiglu, out)
    if not y.numel():
        return y
    block_m, block_n, block_w, warps = dot_tiles(len(flat))
    quantized_dot_kernel[(-(-weight.shape[0] // block_n), -(-len(flat) // block_m))](
        **_around(flat, norm, weight.bias, residual, swiglu, y),
        **_packed(weight),
        N=weight.shape[0],
        GROUPED=weight.group in GROUPS,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_W=block_w,
        num_warps=warps,
        num_stages=dot_stages(
            len(flat), weight.bits, weight.group in GROUPS, weight.levels is not None
        ),
    )
    return y


def _around(
    flat: Tensor,
    norm: RMSNorm | None,
    bias: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    y: Tensor,
) -> dict[str, Any]:
    """Arguments of every product; x stands in for tensors that there are not."""
    return {
        "x_ptr": flat,
        "norm_ptr": flat if norm is None else norm.weight,
        "bias_ptr": flat if bias is None else bias,
        "residual_ptr": flat if residual is None else residual,
        "y_ptr": y,
        "stride_xm": flat.stride(0),
        "M": len(flat),
        "eps": 0.0 if norm is None else norm.eps,
        "NORM": norm is not None,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "SWIGLU": swiglu,
    }


def _packed(weight: QuantizedWeight) -> dict[str, Any]:
    """Arguments of every kernel that unpacks; scales stand in for tensors that there are not."""
    return {
        "words_ptr": weight.words,
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.scales if weight.zeros is None else weight.zeros,
        "levels_ptr": weight.scales if weight.levels is None else weight.levels,
        "K_WORDS": weight.words.shape[1],
        "BITS": weight.bits,
        "BLOCK": math.gcd(128, weight.group),
        "ZEROS": weight.zeros is not None,
        "LEVELS": weight.levels is not None,
    }


def unpacked_matmul(
    x: Tensor,
    weight: QuantizedWeight,
    _norm: None,
    residual: Tensor | None,
    _swiglu: bool,
    *,
    unpacks: Callable[[QuantizedWeight, int, Tensor], None],
    parts: bool = False,
) -> Tensor:
    """x [..., K] -> residual + x W^T + b [..., N] by torch's product, W unpacked into x.dtype some
    rows at a time.

    From some 64 rows on a product is bound by arithmetic, which no hand-written kernel does as
    fast.

    parts: x [N, T, K] has a product of torch's for each part [T, K], for the library chooses the
    order of sums by the number of rows.
    """
    rows, columns = weight.shape
    check_width(x, columns)
    step = min(rows, max(UNPACK_TILE[0], UNPACKED_AT_ONCE // columns))
    flat, added = x.reshape(-1, columns), None if residual is None else residual.reshape(-1, rows)
    unpacked, y = x.new_empty(step, columns), x.new_empty(len(flat), rows)
    height = x.shape[1] if parts else max(len(flat), 1)
    of_rows = [slice(first, first + height) for first in range(0, max(len(flat), 1), height)]
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        part = unpacked[: some.stop - start]
        unpacks(weight, start, part)
        term = None if added is None else added[:, some]
        if weight.bias is not None:
            bias = weight.bias[some].to(x.dtype)
            term = bias if term is None else term + bias
        for each in of_rows:
            if term is None:
                torch.mm(flat[each], part.T, out=y[each, some])
            else:
                bounded = term[each] if term.ndim == 2 else term
                torch.addmm(bounded, flat[each], part.T, out=y[each, some])
    return y.view(*x.shape[:-1], rows)


def unpack(weight: QuantizedWeight, start: int, out: Tensor) -> None:
    """Rows start ... start + R - 1 of a weight, rounded to the dtype of out [R, K]."""
    block_r, block_w, warps = UNPACK_TILE
    unpack_kernel[(-(-len(out) // block_r), -(-weight.words.shape[1] // block_w))](
        **_packed(weight),
        out_ptr=out,
        START=start,
        R=len(out),
        GROUPS=weight.scales.shape[1],
        BLOCK_R=block_r,
        BLOCK_W=block_w,
        num_warps=warps,
    )


cuda_unpack_mm = partial(unpacked_matmul, unpacks=cuda.unpack)
triton_unpack_mm = partial(unpacked_matmul, unpacks=unpack)


def dense_gemv(
    x: Tensor, weight: Weight, norm: RMSNorm | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """x [..., K] of at most GEMV_ROWS rows, a weight of one block [N, K] with contiguous rows."""
    return _block_gemv(x, weight.blocks[0], weight.biases[0], norm, residual, swiglu)


def dense_blocks_gemv(
    x: Tensor, weight: Weight, norm: RMSNorm | None, _residual: None, _swiglu: bool
) -> Tensor:
    """The same with a weight of several blocks: a launch each."""
    return weight.product(lambda block, bias: _block_gemv(x, block, bias, norm, None, False))


def _block_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    rows, columns = weight.shape
    flat, y, residual = _prepare(x, rows, columns, norm, residual, swiglu)
    block_n = gemv_block_n(len(flat), rows)
    dense_gemv_kernel[(-(-rows // block_n),)](
        **early_launch(x, "dense_gemv"),
        **_around(flat, norm, bias, residual, swiglu, y),
        w_ptr=weight,
        stride_wn=weight.stride(0),
        N=rows,
        K=columns,
        BLOCK_N=block_n,
        BLOCK_K=min(1024, max(8, next_power_of_2(columns))),
        LINES=gemv_lines(columns, weight.element_size()),
        num_warps=GEMV_WARPS,
    )
    return y


def gemv_lines(columns: int, itemsize: int) -> int:
    """Lines of 128 bytes of each row of a dense weight that are fetched ahead."""
    return max(1, min(64, next_power_of_2(columns) * itemsize // 128))


def _prepare(
    x: Tensor,
    rows: int,
    columns: int,
    norm: RMSNorm | None,
    residual: Tensor | None,
    swiglu: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] with contiguous rows, the result [..., N] to write, the residual [M, N]
    contiguous."""
    check_width(x, columns)
    if norm is not None and norm.weight.shape != (columns,):
        raise ValueError(f"the norm's weight is {list(norm.weight.shape)}, not {[columns]}")
    if swiglu and rows % 2:
        raise ValueError(f"a weight of {rows} rows does not hold a gate and as many values")
    shape = (*x.shape[:-1], rows // 2 if swiglu else rows)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"the residual is {list(residual.shape)}, not {list(shape)}")
    flat = x.reshape(-1, columns)
    # The CUDA kernel reads 8 bytes at once.
    plain = flat.stride(-1) == 1 and flat.stride(0) % 4 == 0 and flat.data_ptr() % 8 == 0
    flat = flat if plain else flat.contiguous()
    y = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    return flat, y, None if residual is None else _matrix(residual.contiguous())


def _matrix(y: Tensor) -> Tensor:
    """[..., N] as [M, N], without a copy."""
    return y.view(-1, y.shape[-1])


def gemv_block_n(m: int, rows: int, levels: bool = False) -> int:
    # Sums of every row of x with every row of the weight are in registers; a table's levels take
    # most (spills, sm_120).
    if m == 1:
        return 8 if rows > SMALL_N else 4
    return 2 if levels and m > 2 else 4


def gemv_block_w(words: int, bits: int, block: int) -> int:
    """Words of a row at once: 16 bytes a thread, no more than the row has, and whole blocks."""
    return max(min(GEMV_WARPS * 32 * 4, next_power_of_2(words)), block * bits // 32)


def dot_tiles(m: int) -> tuple[int, int, int, int]:
    return next(tiles for limit, tiles in DOT_TILES if m <= limit)


def dot_stages(m: int, bits: int, grouped: bool, levels: bool) -> int:
    # Pipelining would copy every looked-up level through shared memory.
    if levels:
        return 1
    # It spills (sm_86): in small tiles with Triton 3.5, in large ones with 3.6 too.
    spills = SPILLS and bits == 8 and grouped
    return 1 if spills and (m > DOT_TILES[0][0] or TRITON.minor == (3, 5)) else 2


GEMV_CASES = (
    (1, 6144, 4096, "NORM", "BIAS"),
    (1, 22016, 4096, "NORM", "SWIGLU"),
    (1, 3072, 1024, "NORM", "BIAS"),
    (1, 151680, 4096),
    (4, 22016, 4096, "NORM", "SWIGLU"),
    (4, 4096, 11008, "RESIDUAL"),
)
"""(M, rows and columns of the weight, what is inside)."""

DOT_CASES = ((5, "NORM", "BIAS"), (17, "NORM", "SWIGLU"), (17, "RESIDUAL"))


def compile_cases() -> Iterator[Case]:
    """Every tile configuration at the published dimensions, in each format, as the layers call
    it."""
    signature = pointers(bf16="x norm bias residual y w out", i32="words")
    signature["eps"] = "fp32"
    packed = pointers(bf16="scales", fp16="zeros", fp32="levels")
    formats: dict[str, dict[str, Any]] = {
        "int4": {"BITS": 4, "BLOCK": 128, "GROUPED": True, "ZEROS": True, "LEVELS": False},
        "int8": {"BITS": 8, "BLOCK": 128, "GROUPED": False, "ZEROS": False, "LEVELS": False},
        "int8-g128": {"BITS": 8, "BLOCK": 128, "GROUPED": True, "ZEROS": False, "LEVELS": False},
        "nf4": {"BITS": 4, "BLOCK": 64, "GROUPED": True, "ZEROS": False, "LEVELS": True},
    }
    for name, form in formats.items():
        own = signature | packed | (pointers(fp32="scales") if name == "nf4" else {})
        table_spills = form["LEVELS"] and not TABLES_FIT
        for m, rows, k, *around in () if table_spills else GEMV_CASES:
            block_w = gemv_block_w(k * form["BITS"] // 32, form["BITS"], form["BLOCK"])
            tiles = {"M": m, "BLOCK_N": gemv_block_n(m, rows, form["LEVELS"]), "BLOCK_W": block_w}
            yield Case(
                f"{name} gemv M={m} {rows}x{k}{_named(around)}",
                quantized_gemv_kernel,
                own,
                {**form, **_flags(around), **tiles},
                GEMV_WARPS,
                wide_loads=True,
            )
        for m, *around in (*DOT_CASES, *(((1, "NORM", "BIAS"),) if table_spills else ())):
            block_m, block_n, block_w, warps = dot_tiles(m)
            tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_W": block_w}
            # As Triton compiles a launch with an integer of 1.
            tiles |= {"M": 1} if m == 1 else {}
            yield Case(
                f"{name} dot M={m}{_named(around)}",
                quantized_dot_kernel,
                own,
                {**form, **_flags(around), **tiles},
                warps,
                dot_stages(m, form["BITS"], form["GROUPED"], form["LEVELS"]),
                unaligned=("M",),
            )
        block_r, block_w, warps = UNPACK_TILE
        yield Case(
            f"{name} unpack",
            unpack_kernel,
            own,
            {key: form[key] for key in ("BITS", "BLOCK", "ZEROS", "LEVELS")}
            | {"BLOCK_R": block_r, "BLOCK_W": block_w},
            warps,
            unaligned=("START", "R", "GROUPS"),
        )
    for m, rows, *around in (
        (1, 3072, "NORM", "BIAS"),
        (1, 6144, "NORM", "BIAS"),
        (4, 6144, "NORM", "BIAS"),
        (4, 4096, "RESIDUAL"),
    ):
        tiles = {"M": m, "BLOCK_N": gemv_block_n(m, rows), "BLOCK_K": 1024}
        tiles["LINES"] = gemv_lines(4096, 2)
        yield Case(
            f"bf16 gemv M={m} N={rows}{_named(around)}",
            dense_gemv_kernel,
            signature,
            {**_flags(around), **tiles},
            GEMV_WARPS,
            wide_loads=True,
        )


def _flags(around: Sequence[str]) -> dict[str, bool]:
    return {name: name in around for name in ("NORM", "BIAS", "RESIDUAL", "SWIGLU")}


def _named(around: Sequence[str]) -> str:
    return "".join(f" +{name.lower()}" for name in around)
