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
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLUMNS = 128
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


@dataclass(frozen=True)
class Weight:
    """A random weight in the package's layout, without the package.

    See mimo_fast/kernels/matmul/quantized_weight.py.
    """

    bits: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    norm: Tensor | None
    bias: Tensor | None

    @classmethod
    def random(cls, shape: Shape, bits: int) -> Weight:
        groups = shape.k // COLUMNS if bits == 4 else 1
        words = torch.randint(
            -(2**31), 2**31, (shape.n, shape.k * bits // 32), dtype=torch.int64, device="cuda"
        )
        scales = (0.5 + torch.rand(shape.n, groups, device="cuda")) / (
            2 ** (bits - 2) * shape.k**0.5
        )
        zeros = torch.rand(shape.n, groups, device="cuda").half() if bits == 4 else None
        norm = (1 + 0.2 * torch.randn(shape.k, device="cuda")).bfloat16() if shape.norm else None
        bias = torch.randn(shape.n, device="cuda").bfloat16() if shape.bias else None
        return cls(bits, words.int(), scales.bfloat16(), zeros, norm, bias)

    @property
    def nbytes(self) -> int:
        tensors = (self.words, self.scales, self.zeros, self.norm, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def product(self, x: Tensor, k: int, start: int, end: int) -> Tensor:
        """x W^T of some rows of W in float32."""
        planes = 32 // self.bits
        words = self.words[start:end].unflatten(1, (-1, 1, COLUMNS // planes))
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device="cuda")[:, None]
        q = (words >> shifts).bitwise_and(2**self.bits - 1).flatten(2).float() - 2 ** (
            self.bits - 1
        )
        scales = self.scales[start:end].float()
        if self.zeros is not None:
            q = q - self.zeros[start:end].float()[..., None]
        dense = (q * scales[..., None]).flatten(1)
        return x @ dense.view(-1, k).T


@dataclass
class Inputs:
    """What one launch takes beside the weight, and room for its result."""

    shape: Shape
    x: Tensor
    residual: Tensor | None
    y: Tensor

    @classmethod
    def random(cls, shape: Shape, rows: int) -> Inputs:
        x = torch.randn(rows, shape.k, device="cuda").bfloat16()
        residual = (
            torch.randn(rows, shape.width, device="cuda").bfloat16() if shape.residual else None
        )
        return cls(
            shape, x, residual, torch.full((rows, shape.width), torch.nan, device="cuda").bfloat16()
        )

    def first(self, rows: int) -> Inputs:
        residual = None if self.residual is None else self.residual[:rows]
        return Inputs(
            self.shape, self.x[:rows], residual, torch.full_like(self.y[:rows], torch.nan)
        )


@dataclass
class Library:
    """A build.

    One without `mimo_fast_variants` has the interface that products had until 2026-11-27.
    """

    name: str
    path: str
    loaded: ctypes.CDLL = field(init=False)

    def __post_init__(self) -> None:
        self.loaded = ctypes.CDLL(str(Path(self.path).resolve()))
        self.chooses = hasattr(self.loaded, "mimo_fast_variants")
        integers = 8 if self.chooses else 6
        product = self.loaded.mimo_fast_quantized_mma
        product.argtypes = [
            *[ctypes.c_void_p] * 8,
            ctypes.c_int64,
            *[ctypes.c_int] * integers,
            ctypes.c_float,
            ctypes.c_void_p,
        ]
        product.restype = ctypes.c_int

    @property
    def variants(self) -> range:
        return range(1, self.loaded.mimo_fast_variants()) if self.chooses else range(0)

    def launch(self, weight: Weight, inputs: Inputs, variant: int = 0) -> int:
        """A cudaError_t, 0 for success."""
        shape, tensors = (
            inputs.shape,
            (
                inputs.x,
                weight.norm,
                weight.words,
                weight.scales,
                weight.zeros,
                weight.bias,
                inputs.residual,
                inputs.y,
            ),
        )
        more = (0, variant) if self.chooses else ()
        return self.loaded.mimo_fast_quantized_mma(
            *(None if t is None else t.data_ptr() for t in tensors),
            inputs.x.stride(0),
            len(inputs.x),
            shape.n,
            shape.k,
            weight.bits,
            weight.scales.shape[1] > 1,
            shape.swiglu,
            *more,
            EPS if shape.norm else 0.0,
            torch.cuda.current_stream().cuda_stream,
        )


def reference(weight: Weight, inputs: Inputs) -> Tensor:
    """The product and what is around it in float32, without a rounding in between."""
    shape, x = inputs.shape, inputs.x.float()
    if weight.norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.norm.float()
    step = 2**26 // shape.k
    parts = [weight.product(x, shape.k, i, min(i + step, shape.n)) for i in range(0, shape.n, step)]
    y = torch.cat(parts, dim=1)
    if weight.bias is not None:
        y = y + weight.bias.float()
    if shape.swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y if inputs.residual is None else y + inputs.residual.float()


def fault(
    library: Library, weight: Weight, inputs: Inputs, want: Tensor, variant: int = 0
) -> str | None:
    """What is wrong with a build's result: None for nothing. It is left in `inputs.y`."""
    inputs.y.fill_(torch.nan)
    error = library.launch(weight, inputs, variant)
    if error:
        return f"CUDA error {error}"
    torch.cuda.synchronize()
    off = ((inputs.y.float() - want).norm() / want.norm()).item()
    return None if off < ERROR else f"off by {off:.3g}"


def dependent(
    library: Library, weight: Weight, inputs: Inputs, rows: tuple[int, ...], variant: int = 0
) -> list[int]:
    """Numbers of rows whose results differ in any bit from those among all rows of `inputs`."""
    differ = []
    for m in rows:
        some = inputs.first(m)
        if library.launch(weight, some, variant):
            differ.append(m)
        torch.cuda.synchronize()
        if not torch.equal(some.y.view(torch.int16), inputs.y[:m].view(torch.int16)):
            differ.append(m)
    return differ


def microseconds(
    library: Library,
    weights: list[Weight],
    inputs: Inputs,
    variant: int = 0,
    replays: int = 5,
    launches: int = 0,
) -> float:
    """Microseconds of a launch, the median of several replays of a graph over all weights.

    Chained as in a model.
    """
    launches = launches or max(16, -(-32 // len(weights)) * len(weights))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        library.launch(weights[0], inputs, variant)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                library.launch(weights[i % len(weights)], inputs, variant)
        return replayed(graph, stream, replays) / launches


def replayed(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, replays: int) -> float:
    """Microseconds, the median; after one replay that is not timed."""
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        graph.replay()
        end.record(stream)
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def cases(only: list[str]) -> Iterator[tuple[Shape, int]]:
    """int8 first, which the patch decoder has in all models."""
    for bits in (8, 4):
        for shape in SHAPES:
            if not only or any(part in shape.name for part in only):
                yield shape, bits


def chain(
    libraries: list[Library], records: list[dict[str, Any]], bits: int, replays: int
) -> dict[str, Any]:
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
    found: dict[str, Any] = {}
    for library in libraries:
        choices = {library.name: [0] * len(shapes)}
        for variant in library.variants:
            choices[f"{library.name}.{variant}"] = [variant] * len(shapes)
        best = [fastest(library, records, shape, bits) for shape in shapes]
        if library.variants:
            choices[f"{library.name}.best {best}"] = best
        for name, choice in choices.items():
            try:
                found[name] = round(layer(library, layers, inputs, choice, replays), 3)
            except RuntimeError as error:
                found[name] = str(error)
    return {"shape": "patch_decoder, layer", "bits": bits, "rows": 1, "layer": found}


def fastest(library: Library, records: list[dict[str, Any]], shape: Shape, bits: int) -> int:
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
                if error := library.launch(weight, given, variant):
                    raise RuntimeError(f"CUDA error {error}")

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            launch()
        return replayed(graph, stream, replays) / len(layers)


def study(libraries: list[Library], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each shape, format and number of rows, or "left out" when the time is over.

    The chain follows as soon as its products are there.
    """
    begun, done = time.monotonic(), []
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for shape, bits in cases(arguments.only):
        if time.monotonic() - begun > arguments.seconds:
            yield {"shape": shape.name, "bits": bits, "left out": "time"}
            continue
        first = Weight.random(shape, bits)
        # Three times L2; no more than fits into 2 GB.
        copies = max(2, min(-(-3 * cache // first.nbytes), 2**31 // first.nbytes, 256))
        weights = [first, *(Weight.random(shape, bits) for _ in range(copies - 1))]
        most = Inputs.random(shape, max(ROWS))
        want = reference(first, most)
        faults = {}
        for library in libraries:
            wrong = fault(library, first, most, want)
            differ = [] if wrong else dependent(library, first, most, (1, 8, 16, 33))
            faults[library.name] = wrong or (
                f"rows depend on others with {differ} rows" if differ else None
            )
        for rows in ROWS:
            if time.monotonic() - begun > arguments.seconds:
                yield {"shape": shape.name, "bits": bits, "rows": rows, "left out": "time"}
                continue
            inputs = most.first(rows)
            record: dict[str, Any] = {
                "shape": shape.name,
                "bits": bits,
                "rows": rows,
                "bytes": first.nbytes,
            }
            record["faults"] = {name: wrong for name, wrong in faults.items() if wrong}
            sound = [library for library in libraries if not faults[library.name]]
            record["us"] = {
                library.name: round(microseconds(library, weights, inputs), 3) for library in sound
            }
            if arguments.variants and rows in arguments.variants:
                record["variants"] = variants(sound, weights, most, want, rows, arguments.replays)
            done.append(record)
            yield record
        del weights, first, most, want
        if shape.name == CHAIN[-1] and time.monotonic() - begun < arguments.seconds:
            yield chain(libraries, done, bits, arguments.replays)


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
        if library.variants:
            fault(library, weights[0], inputs, want[:rows])
        usual = inputs.y.clone()
        for variant in library.variants:
            name = f"{library.name}.{variant}"
            wrong = fault(library, weights[0], inputs, want[:rows], variant)
            if not wrong and not torch.equal(usual, inputs.y):
                wrong = "another order of sums"
            found[name] = wrong or round(
                microseconds(library, weights, inputs, variant, replays), 3
            )
    return found


def line(record: dict[str, Any], names: list[str]) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--library",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a build; the first is compared with",
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
    libraries = [Library(*value.split("=", 1)) for value in arguments.library]
    names, records = [library.name for library in libraries], []
    card = torch.cuda.get_device_name(0)
    print(f"{card}, torch {torch.__version__}; ratios are to {names[0]}", flush=True)
    for record in study(libraries, arguments):
        records.append(record)
        print(line(record, names), flush=True)
        if arguments.out:
            found = {
                "device": card,
                "torch": torch.__version__,
                "libraries": names,
                "records": records,
            }
            arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(record.get("faults") for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
