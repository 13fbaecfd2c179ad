"""Products of 9 to 256 rows: the kernel with tiles of rows beside what it replaces.

    python -m benchmarks.studies.row_tiles --out row_tiles.json
    python -m benchmarks.studies.row_tiles --predict --library PATH

The second predicts, without a GPU, from a build of csrc/cuda for the CPU (tests/emulated.py).

The published model's products, int4 in groups of 128, int8 by row and dense bfloat16. Ways to the
same result: `tiles` (csrc/cuda/row_tiles.cu), `mma` (csrc/cuda/quantized_mma.cu), `unpacked`
(csrc/cuda/unpack.cu and torch's product) and, with a bfloat16 weight, `torch`. The tiles are
checked first: against float32, and bit for bit against `mma`, for which a row has the bits that it
has alone, in every configuration and with any number of rows; formats and epilogues that are not
timed likewise. Times are of CUDA graphs that go through weights which together exceed L2 three
times. Each line is printed at once; after `--seconds` no measurement begins.

A prediction is `cycles` of csrc/cuda/row_tiles.cu at the clock of an H100, at least the time of the
bytes of W, and one launch more. Its floor is the larger of the bytes at 3.12 TB/s and the
multiplications at 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.studies.common import Record, card, collect, microseconds, parser_of
from benchmarks.studies.products import (
    EPS,
    ERROR,
    SHAPES,
    Inputs,
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
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.norm import RMSNorm

ROWS = (9, 16, 32, 64, 128, 256)
CHECKED = (1, 8, 9, 16, 17, 64, 100, 127, 128, 129, 200, 255, 256)
TIMED = tuple(shape for shape in SHAPES if shape.name != "text_head")
OTHER = (
    Shape("odd", 1000, 640, bias=True, residual=True),
    Shape("odd swiglu", 1016, 2176, norm=True, swiglu=True, residual=True),
)

H100 = (132, 227 * 1024)
CLOCK, BANDWIDTH, FLOPS, LAUNCH = 1755.0, 3.12e6, 989e6, 1.5
"""Of an H100: cycles, bytes and floating-point operations a microsecond; microseconds that sorting
x first is predicted to take."""


@dataclass(frozen=True)
class Case:
    """A weight, 4 or 8 bits or dense (16), with the norm before it."""

    shape: Shape
    bits: int
    matrix: QuantizedWeight | Tensor
    norm: RMSNorm | None
    bias: Tensor | None = None

    @classmethod
    def random(cls, shape: Shape, bits: int) -> Case:
        if bits < 16:
            weight = Weight.random(shape, bits)
            return cls(shape, bits, weight.matrix, weight.norm)
        norm = RMSNorm(1 + 0.2 * random(shape.k), EPS) if shape.norm else None
        bias = random(shape.n) if shape.bias else None
        return cls(shape, bits, random(shape.n, shape.k) / shape.k**0.5, norm, bias)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def exact(self, inputs: Inputs) -> Tensor:
        """In float32, without a rounding in between."""
        if isinstance(self.matrix, QuantizedWeight):
            return reference(Weight(self.matrix, self.norm), inputs)
        x = inputs.x.float()
        if self.norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.norm.weight.float()
        y = torch.nn.functional.linear(x, self.matrix.float())
        if self.bias is not None:
            y = y + self.bias.float()
        if self.shape.swiglu:
            gate, up = y.chunk(2, dim=-1)
            y = torch.nn.functional.silu(gate) * up
        return y if inputs.residual is None else y + inputs.residual.float()


class Tiles:
    """The kernels of a build."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.loaded = cuda.declared(loaded)
        self.variants = range(1, self.loaded.mimo_fast_row_tiles_variants())

    def tiles(self, case: Case, inputs: Inputs, variant: int = 0) -> None:
        around = (case.norm, inputs.residual, case.shape.swiglu, inputs.y)
        cuda.row_tiles(inputs.x, case.matrix, *around, self.loaded, variant, case.bias)

    def mma(self, case: Case, inputs: Inputs) -> None:
        assert isinstance(case.matrix, QuantizedWeight)
        around = (case.norm, inputs.residual, case.shape.swiglu, inputs.y)
        cuda.quantized_mma(inputs.x, case.matrix, *around, self.loaded)

    def unpacked(self, case: Case, inputs: Inputs) -> None:
        """The product alone, as the package does for many rows."""
        assert isinstance(case.matrix, QuantizedWeight)
        unpacks = partial(cuda.unpack, loaded=self.loaded)
        bare = replace(case.matrix, bias=None)
        unpacked_matmul(inputs.x, bare, None, None, False, unpacks=unpacks)

    def torch(self, case: Case, inputs: Inputs) -> None:
        """The product alone."""
        assert isinstance(case.matrix, Tensor)
        torch.nn.functional.linear(inputs.x, case.matrix)

    def possible(self, case: Case, inputs: Inputs) -> Iterator[int]:
        """The configurations that the device does not refuse."""
        for variant in self.variants:
            try:
                self.tiles(case, inputs, variant)
            except RuntimeError:
                continue
            yield variant

    def predicted(self, shape: Shape, bits: int, rows: int) -> tuple[int, float]:
        """The configuration, and microseconds on this device at the clock of an H100."""
        nbytes = shape.n * shape.k * bits / 8
        variant, cycles = cuda.row_tiles_choice(
            self.loaded, rows, (shape.n, shape.k), bits, bits == 4, shape.swiglu
        )
        return variant, max(cycles / CLOCK, nbytes / BANDWIDTH) + LAUNCH


def floor(shape: Shape, bits: int, rows: int) -> float:
    """Microseconds of an H100 that the bytes of W, or the multiplications, take at least."""
    values = shape.n * shape.k
    return max(values * bits / 8 / BANDWIDTH, 2 * rows * values / FLOPS)


def result(run: partial[None], inputs: Inputs) -> Tensor:
    inputs.y.fill_(torch.nan)
    run()
    torch.cuda.synchronize()
    return inputs.y.clone()


def faults(library: Tiles, case: Case) -> list[str]:
    """What is wrong with the tiles, or nothing."""
    found, most = [], Inputs.random(case.shape, max(CHECKED))
    try:
        got = result(partial(library.tiles, case, most), most)
    except RuntimeError as error:
        return [str(error)]
    if not (size := off(got, case.exact(most))) < ERROR:
        found.append(f"off by {size:.3g}")
    want = got
    if case.bits < 16:
        want = result(partial(library.mma, case, most), most)
        if not same_bits(got, want):
            found.append(f"other bits than few rows have ({off(got, want.float()):.3g})")
    for rows in CHECKED:
        some = most.first(rows)
        if not same_bits(result(partial(library.tiles, case, some), some), want[:rows]):
            found.append(f"{rows} rows: other bits")
    for variant in library.possible(case, most):
        if not same_bits(result(partial(library.tiles, case, most, variant), most), want):
            found.append(f"variant {variant}: other bits")
    return found


def other_forms(library: Tiles) -> Iterator[Record]:
    """Checks what is not timed: int4 without zeros, int8 in groups, widths that no tile divides."""
    for shape in OTHER:
        for bits in (4, 8, 16):
            case = Case.random(shape, bits)
            forms = {f"{bits} bits": case}
            if isinstance(case.matrix, QuantizedWeight):
                matrix = case.matrix
                if bits == 4:
                    other = replace(matrix, zeros=None)
                else:
                    spread = 0.5 + torch.rand(shape.n, shape.k // cuda.COLUMNS, device="cuda")
                    other = replace(matrix, scales=(matrix.scales * spread).bfloat16())
                forms[f"{bits} bits, other scales"] = replace(case, matrix=other)
            for name, each in forms.items():
                yield {"checked": f"{shape.name}, {name}", "faults": faults(library, each)}


def study(library: Tiles, arguments: argparse.Namespace) -> Iterator[Record]:
    end = time.monotonic() + arguments.seconds
    yield from other_forms(library)
    for bits in arguments.bits:
        for shape in TIMED:
            head: Record = {"shape": shape.name, "bits": bits}
            if time.monotonic() > end:
                yield {**head, "left out": "time"}
                continue
            cases = copies(shape, bits, Case.random)
            wrong, most = faults(library, cases[0]), Inputs.random(shape, max(ROWS))
            for rows in ROWS:
                if time.monotonic() > end:
                    yield {**head, "rows": rows, "left out": "time"}
                    continue
                inputs = most.first(rows)
                variant, predicted = library.predicted(shape, bits, rows)
                names = ("tiles", "torch") if bits == 16 else ("tiles", "mma", "unpacked")
                us = {name: timed(getattr(library, name), cases, inputs) for name in names}
                if rows in arguments.variants:
                    for each in library.possible(cases[0], inputs):
                        us[f"v{each}"] = timed(partial(library.tiles, variant=each), cases, inputs)
                yield {
                    **head,
                    "rows": rows,
                    "bytes": cases[0].nbytes,
                    "faults": wrong,
                    "variant": variant,
                    "predicted": round(predicted, 1),
                    "floor": round(floor(shape, bits, rows), 1),
                    "us": us,
                }
            del cases, most


def timed(run: Callable[[Case, Inputs], None], cases: list[Case], inputs: Inputs) -> float:
    """Microseconds of a launch among many over all weights."""
    count = max(8, len(cases))
    return round(
        microseconds([partial(run, cases[i % len(cases)], inputs) for i in range(count)]), 2
    )


def predictions(library: Tiles, formats: Sequence[int]) -> Iterator[Record]:
    for bits in formats:
        for shape in TIMED:
            for rows in ROWS:
                variant, predicted = library.predicted(shape, bits, rows)
                yield {
                    "shape": shape.name,
                    "bits": bits,
                    "rows": rows,
                    "variant": variant,
                    "predicted": round(predicted, 1),
                    "floor": round(floor(shape, bits, rows), 1),
                }


def line(record: Record) -> str:
    wrong = "; ".join(record.get("faults", ()))
    if "checked" in record:
        return f"{record['checked']}: {wrong or 'right'}"
    head = f"{record['shape']:<22} {record['bits']:>2} bits {record.get('rows', ''):>3}"
    if "left out" in record:
        return f"{head}  left out: {record['left out']}"
    parts = [f"v{record['variant']} predicted {record['predicted']}, floor {record['floor']} us"]
    parts += [f"{name} {us}" for name, us in record.get("us", {}).items()]
    return f"{head}  " + "  ".join(parts) + (f"  FAULTS {wrong}" if wrong else "")


def main() -> int:
    parser = parser_of(__doc__)
    add_options(parser, bits=(4, 8, 16), seconds=50, variants=(16, 64, 128))
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--predict", action="store_true", help="for an H100, and do no more")
    arguments = parser.parse_args()
    loaded = ctypes.CDLL(str(arguments.library.resolve()))
    library = Tiles(loaded)
    if arguments.predict:
        loaded.mimo_fast_set_device(*H100)
        return collect(predictions(library, arguments.bits), line, {}, arguments.out)
    torch.manual_seed(time.time_ns() % 2**31)
    print(f"{card()}; microseconds", flush=True)
    return collect(study(library, arguments), line, card(), arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
