"""Products of a prompt's rows with quantized weights: the fused kernel beside what it replaces.

    python -m benchmarks.studies.gemm --out gemm.json

The backbone's shapes, int4 in groups of 128 and int8 by row, 48 to 512 rows of x. Three ways to the
same result: `fused` (csrc/cuda/quantized_gemm.cu), `unpacked` (csrc/cuda/unpack.cu and torch's
product, a piece of the weight at a time), and `dense` (torch's product with a bfloat16 copy of the
weight, which no quantized model has). Each is checked against float32 first, the fused one for rows
that do not depend on their neighbours, bit for bit, in every configuration. Times are of CUDA
graphs that go through weights which together exceed L2 three times. Each line is printed at once;
after `--seconds` no measurement begins.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.common import Record, card, collect, microseconds, parser_of
from benchmarks.studies.products import (
    ERROR,
    Inputs,
    Library,
    Shape,
    Weight,
    add_options,
    copies,
    off,
    random,
    reference,
    same_bits,
)
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul.launch import unpacked_matmul

ROWS = (48, 64, 96, 128, 256, 512)
SHAPES = (
    Shape("qkv", 6144, 4096, bias=True),
    Shape("o", 4096, 4096, residual=True),
    Shape("gate_up", 22016, 4096, swiglu=True),
    Shape("down", 4096, 11008, residual=True),
)


class Gemm(Library):
    """The fused product and the unpacking of a build."""

    def __init__(self, path: Path) -> None:
        super().__init__("", path)
        self.variants = range(1, self.loaded.mimo_fast_gemm_variants())

    def launch(self, weight: Weight, inputs: Inputs, variant: int = 0) -> None:
        cuda.quantized_gemm(
            inputs.x,
            weight.matrix,
            inputs.residual,
            inputs.shape.swiglu,
            inputs.y,
            self.loaded,
            variant,
        )

    def unpacked(self, weight: Weight, x: Tensor) -> Tensor:
        """As the package does for many rows."""
        unpacks = partial(cuda.unpack, loaded=self.loaded)
        return unpacked_matmul(x, weight.matrix, None, None, False, unpacks=unpacks)


def plain(weight: Weight) -> Weight:
    """Without a bias, for which a product of torch's would need another launch."""
    return replace(weight, matrix=replace(weight.matrix, bias=None))


def faults(library: Gemm, weight: Weight, inputs: Inputs, want: Tensor) -> list[str]:
    """What is wrong with the fused product, or nothing.

    Each configuration must give the default's bits, and so must each number of rows.
    """
    found = []
    inputs.y.fill_(torch.nan)
    try:
        library.launch(weight, inputs)
    except RuntimeError as error:
        return [str(error)]
    torch.cuda.synchronize()
    usual = inputs.y.clone()
    if not (size := off(usual, want)) < ERROR:
        found.append(f"off by {size:.3g}")
    for rows in (*ROWS, 1, 17, 113):
        some = inputs.first(min(rows, len(usual)))
        library.launch(weight, some)
        torch.cuda.synchronize()
        if not same_bits(some.y, usual[: len(some.y)]):
            found.append(f"{rows} rows: other bits ({off(some.y, want[: len(some.y)]):.3g})")
    for variant in possible(library, weight, inputs):
        inputs.y.fill_(torch.nan)
        library.launch(weight, inputs, variant)
        torch.cuda.synchronize()
        if not same_bits(inputs.y, usual):
            found.append(f"variant {variant}: other bits ({off(inputs.y, want):.3g})")
    return found


def possible(library: Gemm, weight: Weight, inputs: Inputs) -> Iterator[int]:
    """The configurations that the device does not refuse."""
    for variant in library.variants:
        try:
            library.launch(weight, inputs, variant)
        except RuntimeError:
            continue
        yield variant


def other_formats(library: Gemm, formats: Sequence[int]) -> Iterator[Record]:
    """Checks formats that are not timed.

    float16, int4 without zeros, int8 in groups; a width that no tile divides.
    """
    shape = Shape("other", 1000, 640, bias=True, residual=True)
    for bits in formats:
        for dtype in (torch.bfloat16, torch.float16):
            matrix, inputs = Weight.random(shape, bits).matrix, Inputs.random(shape, max(ROWS))
            assert matrix.bias is not None
            assert inputs.residual is not None
            matrix = replace(matrix, scales=matrix.scales.to(dtype), bias=matrix.bias.to(dtype))
            tensors = {name: getattr(inputs, name).to(dtype) for name in ("x", "residual", "y")}
            inputs = replace(inputs, **tensors)
            cases = {"": matrix}
            if bits == 4:
                cases["-sym"] = replace(matrix, zeros=None)
            else:
                spread = 0.5 + torch.rand(shape.n, shape.k // cuda.COLUMNS, device="cuda")
                cases["-g128"] = replace(matrix, scales=(matrix.scales * spread).to(dtype))
            for name, case in cases.items():
                weight = Weight(case, None)
                wrong = faults(library, weight, inputs, reference(weight, inputs))
                yield {"checked": f"int{bits}{name} {dtype}", "faults": wrong}


def study(library: Gemm, arguments: argparse.Namespace) -> Iterator[Record]:
    end = time.monotonic() + arguments.seconds
    yield from other_formats(library, arguments.bits)
    for bits in arguments.bits:
        for shape in SHAPES:
            head: Record = {"shape": shape.name, "bits": bits}
            if time.monotonic() > end:
                yield {**head, "left out": "time"}
                continue
            weights, most = copies(shape, bits), Inputs.random(shape, max(ROWS))
            first, unbiased = weights[0], [plain(weight) for weight in weights]
            wrong = faults(library, first, most, reference(first, most))
            bare = Inputs.random(Shape(shape.name, shape.n, shape.k), max(ROWS))
            error = off(library.unpacked(unbiased[0], bare.x), reference(unbiased[0], bare))
            if not error < ERROR:
                wrong.append(f"unpacked: off by {error:.3g}")
            # As many bytes as the packed weights have at least.
            count = -(-len(weights) * bits // 16)
            dense = [random(shape.n, shape.k) for _ in range(count)]
            for rows in ROWS:
                if time.monotonic() > end:
                    yield {**head, "rows": rows, "left out": "time"}
                    continue
                us = times(library, weights, unbiased, dense, most.first(rows), bare.x[:rows])
                for variant in (
                    possible(library, first, most.first(rows)) if rows in arguments.variants else ()
                ):
                    us[f"v{variant}"] = fused(library, weights, most.first(rows), variant)
                flop = 2 * rows * shape.n * shape.k
                yield {
                    **head,
                    "rows": rows,
                    "bytes": first.nbytes,
                    "faults": wrong,
                    "us": {name: round(value, 2) for name, value in us.items()},
                    "tflops": {name: round(flop / value / 1e6, 1) for name, value in us.items()},
                }
            del weights, unbiased, first, most, dense, bare


def fused(library: Gemm, weights: list[Weight], inputs: Inputs, variant: int = 0) -> float:
    return turns(weights, lambda weight: library.launch(weight, inputs, variant))


def turns(of: list[Any], launch: Callable[[Any], object], least: int = 8) -> float:
    """Microseconds of a launch for each of them, and for the first ones again up to so many."""
    count = max(least, len(of))
    return microseconds([partial(launch, of[i % len(of)]) for i in range(count)])


def times(
    library: Gemm,
    weights: list[Weight],
    unbiased: list[Weight],
    dense: list[Tensor],
    inputs: Inputs,
    x: Tensor,
) -> dict[str, float]:
    y = x.new_empty(len(x), len(dense[0]))
    return {
        "fused": fused(library, weights, inputs),
        "unpacked": turns(unbiased, lambda weight: library.unpacked(weight, x)),
        "dense": turns(dense, lambda weight: torch.mm(x, weight.T, out=y), 4),
    }


def line(record: Record) -> str:
    wrong = "; ".join(record.get("faults", ()))
    if "checked" in record:
        return f"{record['checked']}: {wrong or 'right'}"
    head = f"{record['shape']:<8} int{record['bits']} {record.get('rows', ''):>3}"
    if "left out" in record:
        return f"{head}  left out: {record['left out']}"
    parts = [
        f"{name} {us:.1f} us {record['tflops'][name]:.0f}" for name, us in record["us"].items()
    ]
    return f"{head}  " + "  ".join(parts) + (f"  FAULTS {wrong}" if wrong else "")


def main() -> int:
    parser = parser_of(__doc__)
    add_options(parser, bits=(4, 8), seconds=30, variants=(64, 128, 256))
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    print(f"{card()}; microseconds and TFLOP/s", flush=True)
    records = study(Gemm(arguments.library), arguments)
    return collect(records, line, card(), arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
