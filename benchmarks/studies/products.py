"""Products of few rows: builds of the CUDA library side by side, in one process on one GPU.

    python -m benchmarks.studies.products --library old=PATH --library new=PATH --out products.json

Every product of the 7B model's decode path, int4 in groups of 128 and int8 by row, with 1 to 64
rows of x. A build is compared with float32 of the dequantized weight on fresh random inputs, then
checked for rows that do not depend on their neighbours, bit for bit. Only then is it timed: CUDA
graphs of many launches over weights that together are three times as large as L2. Each line is
printed at once; no measurement starts after `--seconds`. Each configuration of a build is timed at
the numbers of rows that `--variants` names.

Then the patch decoder's products in their order, 16 layers in one graph with one row of x: the cost
of a layer where kernels start while the one before ends. Each build runs with its own choice, with
each configuration for all products, and with the best one for each product.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.studies.common import Record, card, collect, microseconds, parser_of
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.kernels.norm import RMSNorm

ROWS = (1, 4, 8, 16, 64)
ERROR = 6e-3
"""Relative norm of the error that bfloat16 rounding leaves.

It rounds the result, and x times the norm's weight.
"""

EPS = 1e-6

LAYERS = 16
CHAIN = tuple(f"patch_decoder.{name}" for name in ("qkv", "o", "gate_up", "down"))


@dataclass(frozen=True)
class Shape:
    """y [M, N] of x [M, K], with what a layer does around it."""

    name: str
    n: int
    k: int
    norm: bool = False
    bias: bool = False
    swiglu: bool = False
    residual: bool = False

    @property
    def width(self) -> int:
        return self.n // 2 if self.swiglu else self.n


SHAPES = (
    Shape("patch_decoder.qkv", 3072, 1024, norm=True, bias=True),
    Shape("patch_decoder.o", 1024, 1024, residual=True),
    Shape("patch_decoder.gate_up", 8192, 1024, norm=True, swiglu=True),
    Shape("patch_decoder.down", 1024, 4096, residual=True),
    Shape("backbone.qkv", 6144, 4096, norm=True, bias=True),
    Shape("backbone.o", 4096, 4096, residual=True),
    Shape("backbone.gate_up", 22016, 4096, norm=True, swiglu=True),
    Shape("backbone.down", 4096, 11008, residual=True),
    Shape("text_head", 151680, 4096),
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


@dataclass(frozen=True)
class Weight:
    """A matrix with the norm before it."""

    matrix: QuantizedWeight
    norm: RMSNorm | None

    @classmethod
    def random(cls, shape: Shape, bits: int) -> Weight:
        groups = shape.k // cuda.COLUMNS if bits == 4 else 1
        words = torch.randint(
            -(2**31), 2**31, (shape.n, shape.k * bits // 32), dtype=torch.int64, device="cuda"
        )
        scales = (0.5 + torch.rand(shape.n, groups, device="cuda")) / (
            2 ** (bits - 2) * shape.k**0.5
        )
        zeros = torch.rand(shape.n, groups, device="cuda").half() if bits == 4 else None
        norm = RMSNorm(1 + 0.2 * random(shape.k), EPS) if shape.norm else None
        bias = random(shape.n) if shape.bias else None
        return cls(QuantizedWeight(words.int(), scales.bfloat16(), zeros, bias, bits), norm)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + (self.norm.weight.nbytes if self.norm else 0)


@dataclass
class Inputs:
    """What one launch takes beside the weight, and room for its result."""

    shape: Shape
    x: Tensor
    residual: Tensor | None
    y: Tensor

    @classmethod
    def random(cls, shape: Shape, rows: int) -> Inputs:
        residual = random(rows, shape.width) if shape.residual else None
        y = torch.full((rows, shape.width), torch.nan, device="cuda").bfloat16()
        return cls(shape, random(rows, shape.k), residual, y)

    def first(self, rows: int) -> Inputs:
        residual = None if self.residual is None else self.residual[:rows]
        y = torch.full_like(self.y[:rows], torch.nan)
        return Inputs(self.shape, self.x[:rows], residual, y)


class Library:
    """A build of csrc/cuda; the package's where no path is given."""

    def __init__(self, name: str, path: str | Path = cuda.LIBRARY) -> None:
        self.name, self.loaded = name, cuda.declared(ctypes.CDLL(str(Path(path).resolve())))
        self.variants = range(1, self.loaded.mimo_fast_variants())

    def launch(self, weight: Weight, inputs: Inputs, variant: int = 0) -> None:
        """Raises RuntimeError where the device refuses."""
        cuda.quantized_mma(
            inputs.x,
            weight.matrix,
            weight.norm,
            inputs.residual,
            inputs.shape.swiglu,
            inputs.y,
            self.loaded,
            variant,
        )


def reference(weight: Weight, inputs: Inputs) -> Tensor:
    """The product and what is around it in float32, without a rounding in between."""
    shape, matrix, x = inputs.shape, weight.matrix, inputs.x.float()
    if weight.norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.norm.weight.float()
    step = 2**26 // shape.k
    y = torch.cat([x @ dequantize(matrix, i, i + step).T for i in range(0, shape.n, step)], dim=1)
    if matrix.bias is not None:
        y = y + matrix.bias.float()
    if shape.swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y if inputs.residual is None else y + inputs.residual.float()


class Sized(Protocol):
    """Something of so many bytes."""

    @property
    def nbytes(self) -> int: ...


Made = TypeVar("Made", bound=Sized)


def same_bits(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.view(torch.int16), want.view(torch.int16))


def off(got: Tensor, want: Tensor) -> float:
    """Norm of the error, relative to the result's."""
    return ((got.float() - want).norm() / want.norm()).item()


def copies(
    shape: Shape, bits: int, make: Callable[[Shape, int], Made] = Weight.random
) -> list[Made]:
    """Weights that together are three times as large as L2, of no more than 2 GB; at least two."""
    first = make(shape, bits)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(-(-3 * cache // first.nbytes), 2**31 // first.nbytes, 256))
    return [first, *(make(shape, bits) for _ in range(count - 1))]


def fault(
    library: Library, weight: Weight, inputs: Inputs, want: Tensor, variant: int = 0
) -> str | None:
    """What is wrong with a build's result: None for nothing. It is left in `inputs.y`."""
    inputs.y.fill_(torch.nan)
    try:
        library.launch(weight, inputs, variant)
    except RuntimeError as error:
        return str(error)
    torch.cuda.synchronize()
    error_size = off(inputs.y, want)
    return None if error_size < ERROR else f"off by {error_size:.3g}"


def dependent(library: Library, weight: Weight, inputs: Inputs, rows: tuple[int, ...]) -> list[int]:
    """Numbers of rows whose results differ in any bit from those among all rows of `inputs`."""
    differ = []
    for m in rows:
        some = inputs.first(m)
        library.launch(weight, some)
        torch.cuda.synchronize()
        if not same_bits(some.y, inputs.y[:m]):
            differ.append(m)
    return differ


def time_of(
    library: Library, weights: list[Weight], inputs: Inputs, variant: int = 0, replays: int = 5
) -> float:
    """Microseconds of a launch among many over all weights, as in a model."""
    count = max(16, -(-32 // len(weights)) * len(weights))
    launches = [
        partial(library.launch, weights[i % len(weights)], inputs, variant) for i in range(count)
    ]
    return round(microseconds(launches, replays), 3)


def cases(only: list[str]) -> Iterator[tuple[Shape, int]]:
    """int8 first, which the patch decoder has in all models."""
    for bits in (8, 4):
        for shape in SHAPES:
            if not only or any(part in shape.name for part in only):
                yield shape, bits


def chain(libraries: list[Library], records: list[Record], bits: int, replays: int) -> Record:
    """Microseconds of a layer's products by build and configuration.

    "best" takes those that `records` found best for one row.
    """
    shapes = [shape for name in CHAIN for shape in SHAPES if shape.name == name]
    layers = [[Weight.random(shape, bits) for shape in shapes] for _ in range(LAYERS)]
    inputs = [Inputs.random(shape, 1) for shape in shapes]
    # A product reads the result of the one before where shapes allow it; there is no attention.
    inputs[1].x, inputs[2].x, inputs[3].x = inputs[0].y[:, :1024], inputs[1].y, inputs[2].y
    inputs[0].x = inputs[3].y
    for each in inputs:
        each.y.normal_()
    found: Record = {}
    for library in libraries:
        choices = {library.name: [0] * len(shapes)}
        for variant in library.variants:
            choices[f"{library.name}.{variant}"] = [variant] * len(shapes)
        best = [fastest(library, records, shape, bits) for shape in shapes]
        choices[f"{library.name}.best {best}"] = best
        for name, choice in choices.items():
            try:
                found[name] = round(layer(library, layers, inputs, choice, replays), 3)
            except RuntimeError as error:
                found[name] = str(error)
    return {"shape": "patch_decoder, layer", "bits": bits, "rows": 1, "layer": found}


def fastest(library: Library, records: list[Record], shape: Shape, bits: int) -> int:
    """The configuration that was fastest with one row of x; 0 where none was measured."""
    times = {
        variant: us
        for record in records
        if (record["shape"], record["bits"], record.get("rows")) == (shape.name, bits, 1)
        for variant in library.variants
        if isinstance(us := record.get("variants", {}).get(f"{library.name}.{variant}"), float)
    }
    return min(times, key=lambda variant: times[variant], default=0)


def layer(
    library: Library,
    layers: list[list[Weight]],
    inputs: list[Inputs],
    choice: list[int],
    replays: int,
) -> float:
    """Microseconds of a layer of several, in one graph.

    Raises:
        RuntimeError: a launch was refused.
    """

    def launch() -> None:
        for weights in layers:
            for weight, given, variant in zip(weights, inputs, choice, strict=True):
                library.launch(weight, given, variant)

    return microseconds([launch], replays) / len(layers)


def study(libraries: list[Library], arguments: argparse.Namespace) -> Iterator[Record]:
    """A record for each shape, format and number of rows, or "left out" when the time is over.

    The chain follows as soon as its products are there.
    """
    end, done = time.monotonic() + arguments.seconds, []
    for shape, bits in cases(arguments.only):
        head: Record = {"shape": shape.name, "bits": bits}
        if time.monotonic() > end:
            yield {**head, "left out": "time"}
            continue
        weights, most = copies(shape, bits), Inputs.random(shape, max(ROWS))
        first, want = weights[0], reference(weights[0], most)
        faults = {library.name: faults_of(library, first, most, want) for library in libraries}
        sound = [library for library in libraries if not faults[library.name]]
        for rows in ROWS:
            if time.monotonic() > end:
                yield {**head, "rows": rows, "left out": "time"}
                continue
            inputs = most.first(rows)
            record: Record = {
                **head,
                "rows": rows,
                "bytes": first.nbytes,
                "faults": {name: wrong for name, wrong in faults.items() if wrong},
                "us": {library.name: time_of(library, weights, inputs) for library in sound},
            }
            if rows in arguments.variants:
                record["variants"] = variants(sound, weights, most, want, rows, arguments.replays)
            done.append(record)
            yield record
        del weights, first, most, want
        if shape.name == CHAIN[-1] and time.monotonic() < end:
            yield chain(libraries, done, bits, arguments.replays)


def faults_of(library: Library, weight: Weight, inputs: Inputs, want: Tensor) -> str | None:
    """`fault`, or the numbers of rows whose results depend on the other rows."""
    if wrong := fault(library, weight, inputs, want):
        return wrong
    differ = dependent(library, weight, inputs, (1, 8, 16, 33))
    return f"rows depend on others with {differ} rows" if differ else None


def variants(
    libraries: list[Library],
    weights: list[Weight],
    most: Inputs,
    want: Tensor,
    rows: int,
    replays: int,
) -> dict[str, float | str]:
    """Microseconds of each configuration, or what is wrong with it.

    Its results must be the default's, bit for bit.
    """
    found: dict[str, float | str] = {}
    inputs = most.first(rows)
    for library in libraries:
        fault(library, weights[0], inputs, want[:rows])
        usual = inputs.y.clone()
        for variant in library.variants:
            wrong = fault(library, weights[0], inputs, want[:rows], variant)
            if not wrong and not torch.equal(usual, inputs.y):
                wrong = "another order of sums"
            found[f"{library.name}.{variant}"] = wrong or time_of(
                library, weights, inputs, variant, replays
            )
    return found


def line(record: Record, names: list[str]) -> str:
    head = f"{record['shape']:<22} int{record['bits']} {record.get('rows', ''):>3}"
    if "left out" in record:
        return f"{head}  left out: {record['left out']}"
    if "layer" in record:
        return f"{head}  us: " + "  ".join(f"{name} {us}" for name, us in record["layer"].items())
    us = record["us"]
    parts = [
        f"{name} {us[name]:8.2f} us {record['bytes'] / us[name] / 1e3:7.0f} GB/s"
        for name in names
        if name in us
    ]
    if len(us) > 1:
        first, *others = (us[name] for name in names if name in us)
        parts += [f"{other / first:.2f}" for other in others]
    parts += [f"{name}: {wrong}" for name, wrong in record["faults"].items()]
    if "variants" in record:
        parts.append(" ".join(f"{name} {value}" for name, value in record["variants"].items()))
    return f"{head}  " + "  ".join(parts)


def add_options(
    parser: argparse.ArgumentParser, bits: Sequence[int], seconds: float, variants: Sequence[int]
) -> None:
    """The options of a study of one build, with their defaults."""
    parser.add_argument("--library", type=Path, default=cuda.LIBRARY, help="a build of csrc/cuda")
    parser.add_argument("--bits", type=int, nargs="+", default=[*bits], choices=bits)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="after which no measurement begins"
    )
    parser.add_argument(
        "--variants",
        type=int,
        nargs="*",
        default=[*variants],
        help="numbers of rows with which to time each configuration",
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--library",
        action="append",
        metavar="NAME=PATH",
        help="a build; the first is compared with [the package's]",
    )
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument(
        "--seconds", type=float, default=70, help="after which no measurement begins"
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="shapes whose name contains one of these"
    )
    parser.add_argument(
        "--variants",
        type=int,
        nargs="*",
        default=[1, 8, 16, 64],
        help="numbers of rows with which to time each configuration",
    )
    parser.add_argument("--replays", type=int, default=3, help="of a configuration's graph")
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    named = arguments.library or [f"package={cuda.LIBRARY}"]
    libraries = [Library(*value.split("=", 1)) for value in named]
    names = [library.name for library in libraries]
    about = {**card(), "libraries": names}
    print(f"{about}; ratios are to {names[0]}", flush=True)
    records = study(libraries, arguments)
    return collect(records, lambda record: line(record, names), about, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
