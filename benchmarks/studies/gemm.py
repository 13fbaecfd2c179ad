"""Products of a prompt's rows with quantized weights: the fused kernel beside what it replaces.

    python -m benchmarks.studies.gemm --library PATH --out gemm.json

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
import ctypes
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.products import COLUMNS, ERROR, Inputs, Shape, Weight, reference

ROWS = (48, 64, 96, 128, 256, 512)
SHAPES = (
    Shape("qkv", 6144, 4096, bias=True),
    Shape("o", 4096, 4096, residual=True),
    Shape("gate_up", 22016, 4096, swiglu=True),
    Shape("down", 4096, 11008, residual=True),
)
UNPACKED_AT_ONCE = 2**26
"""As the package's (kernels/matmul/launch.py)."""


class Library:
    """The fused product and the unpacking of a build."""

    def __init__(self, path: str) -> None:
        self.loaded = ctypes.CDLL(str(Path(path).resolve()))
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self.loaded.mimo_fast_quantized_gemm.argtypes = [
            *[pointer] * 7,
            long,
            *[integer] * 8,
            pointer,
        ]
        self.loaded.mimo_fast_unpack.argtypes = [
            *[pointer] * 4,
            *[long] * 2,
            *[integer] * 4,
            pointer,
        ]
        self.variants = range(1, self.loaded.mimo_fast_gemm_variants())

    def fused(self, weight: Weight, inputs: Inputs, variant: int = 0) -> int:
        """A cudaError_t, 0 for success."""
        shape = inputs.shape
        tensors = (
            inputs.x,
            weight.words,
            weight.scales,
            weight.zeros,
            weight.bias,
            inputs.residual,
            inputs.y,
        )
        return self.loaded.mimo_fast_quantized_gemm(
            *(None if t is None else t.data_ptr() for t in tensors),
            inputs.x.stride(0),
            len(inputs.x),
            shape.n,
            shape.k,
            weight.bits,
            weight.scales.shape[1] > 1,
            shape.swiglu,
            inputs.x.dtype == torch.float16,
            variant,
            torch.cuda.current_stream().cuda_stream,
        )

    def unpack(self, weight: Weight, start: int, out: Tensor) -> None:
        tensors = (weight.words, weight.scales, weight.zeros, out)
        error = self.loaded.mimo_fast_unpack(
            *(None if t is None else t.data_ptr() for t in tensors),
            start,
            len(out),
            out.shape[1],
            weight.bits,
            weight.scales.shape[1] > 1,
            out.dtype == torch.float16,
            torch.cuda.current_stream().cuda_stream,
        )
        if error:
            raise RuntimeError(f"unpack: CUDA error {error}")


def plain(shape: Shape) -> Shape:
    """Without what a product of torch's would need more launches for."""
    return replace(shape, bias=False, swiglu=False, residual=False)


def unpacked(library: Library, weight: Weight, x: Tensor, room: Tensor, y: Tensor) -> None:
    """As the package does for many rows, without a bias."""
    n, k = y.shape[1], x.shape[1]
    step = min(n, UNPACKED_AT_ONCE // k)
    for start in range(0, n, step):
        part = room[: min(step, n - start)]
        library.unpack(weight, start, part)
        torch.mm(x, part.T, out=y[:, start : start + step])


def microseconds(launches: list[Callable[[], Any]], replays: int = 3) -> float:
    """Microseconds of a launch, the median of several replays of a graph of all."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches[0]()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
        graph.replay()
        times = []
        for _ in range(replays):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return sorted(times)[len(times) // 2]


def off(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def faults(library: Library, weight: Weight, inputs: Inputs, want: Tensor) -> list[str]:
    """What is wrong with the fused product, or nothing.

    Each configuration must give the default's bits, and so must each number of rows.
    """
    found = []
    inputs.y.fill_(torch.nan)
    error = library.fused(weight, inputs)
    torch.cuda.synchronize()
    if error:
        return [f"CUDA error {error}"]
    usual = inputs.y.clone()
    if not (size := off(usual, want)) < ERROR:
        found.append(f"off by {size:.3g}")
    for rows in (*ROWS, 1, 17, 113):
        some = inputs.first(min(rows, len(usual)))
        library.fused(weight, some)
        torch.cuda.synchronize()
        if not torch.equal(some.y.view(torch.int16), usual[: len(some.y)].view(torch.int16)):
            found.append(f"{rows} rows: other bits ({off(some.y, want[: len(some.y)]):.3g})")
    for variant in library.variants:
        inputs.y.fill_(torch.nan)
        error = library.fused(weight, inputs, variant)
        torch.cuda.synchronize()
        if error:
            continue
        if not torch.equal(inputs.y.view(torch.int16), usual.view(torch.int16)):
            found.append(f"variant {variant}: other bits ({off(inputs.y, want):.3g})")
    return found


def of_type(weight: Weight, inputs: Inputs, dtype: torch.dtype) -> tuple[Weight, Inputs]:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    scales = weight.scales.to(dtype)
    other = replace(weight, scales=scales, bias=cast(weight.bias))
    return other, replace(
        inputs, x=inputs.x.to(dtype), residual=cast(inputs.residual), y=inputs.y.to(dtype)
    )


def other_formats(library: Library, formats: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Checks formats that are not timed.

    float16, int4 without zeros, int8 in groups; a width that no tile divides.
    """
    shape = Shape("other", 1000, 640, bias=True, residual=True)
    for bits in formats:
        for dtype in (torch.bfloat16, torch.float16):
            weight, inputs = of_type(
                Weight.random(shape, bits), Inputs.random(shape, max(ROWS)), dtype
            )
            cases = {"": weight}
            if bits == 4:
                cases["-sym"] = replace(weight, zeros=None)
            else:
                spread = 0.5 + torch.rand(shape.n, shape.k // COLUMNS, device="cuda")
                cases["-g128"] = replace(weight, scales=(weight.scales * spread).to(dtype))
            for name, case in cases.items():
                wrong = faults(library, case, inputs, reference(case, inputs))
                yield {"checked": f"int{bits}{name} {dtype}", "faults": wrong}


def study(library: Library, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    begun = time.monotonic()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    yield from other_formats(library, arguments.bits)
    for bits in arguments.bits:
        for shape in SHAPES:
            head: dict[str, Any] = {"shape": shape.name, "bits": bits}
            if time.monotonic() - begun > arguments.seconds:
                yield {**head, "left out": "time"}
                continue
            first = Weight.random(shape, bits)
            copies = max(2, -(-3 * cache // first.nbytes))
            weights = [first, *(Weight.random(shape, bits) for _ in range(copies - 1))]
            most = Inputs.random(shape, max(ROWS))
            wrong = faults(library, first, most, reference(first, most))
            room = torch.empty(
                min(shape.n, UNPACKED_AT_ONCE // shape.k), shape.k, device="cuda"
            ).bfloat16()
            bare = Inputs.random(plain(shape), max(ROWS))
            unbiased = replace(first, bias=None)
            unpacked(library, unbiased, bare.x, room, bare.y)
            error = off(bare.y, reference(unbiased, bare))
            if not error < ERROR:
                wrong.append(f"unpacked: off by {error:.3g}")
            dense = [
                torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16)
                for _ in range(max(1, -(-3 * cache // (shape.n * shape.k * 2))))
            ]
            for rows in ROWS:
                if time.monotonic() - begun > arguments.seconds:
                    yield {**head, "rows": rows, "left out": "time"}
                    continue
                inputs, some = most.first(rows), bare.first(rows)
                count = max(8, copies)

                def fused(
                    variant: int,
                    inputs: Inputs = inputs,
                    weights: list[Weight] = weights,
                    count: int = count,
                ) -> list[Callable[[], Any]]:
                    return [
                        lambda i=i: library.fused(weights[i % len(weights)], inputs, variant)
                        for i in range(count)
                    ]

                us = {
                    "fused": microseconds(fused(0)),
                    "unpacked": microseconds(
                        [
                            lambda i=i, some=some, weights=weights, room=room: unpacked(
                                library, weights[i % len(weights)], some.x, room, some.y
                            )
                            for i in range(count)
                        ]
                    ),
                    "dense": microseconds(
                        [
                            lambda i=i, some=some, dense=dense: torch.mm(
                                some.x, dense[i % len(dense)].T, out=some.y
                            )
                            for i in range(max(4, len(dense)))
                        ]
                    ),
                }
                for variant in library.variants if rows in arguments.variants else ():
                    if library.fused(first, inputs, variant) == 0:
                        us[f"v{variant}"] = microseconds(fused(variant))
                flop = 2 * rows * shape.n * shape.k
                yield {
                    **head,
                    "rows": rows,
                    "bytes": first.nbytes,
                    "faults": wrong,
                    "us": {name: round(value, 2) for name, value in us.items()},
                    "tflops": {name: round(flop / value / 1e6, 1) for name, value in us.items()},
                }
            del weights, first, most, dense, bare, room


def line(record: dict[str, Any]) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", required=True, help="a build of csrc/cuda")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=(4, 8))
    parser.add_argument(
        "--seconds", type=float, default=30, help="after which no measurement begins"
    )
    parser.add_argument(
        "--variants",
        type=int,
        nargs="*",
        default=[64, 128, 256],
        help="numbers of rows with which to time each configuration",
    )
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    library, records = Library(arguments.library), []
    card = torch.cuda.get_device_name(0)
    print(f"{card}, torch {torch.__version__}; microseconds and TFLOP/s", flush=True)
    for record in study(library, arguments):
        records.append(record)
        print(line(record), flush=True)
        if arguments.out:
            found = {"device": card, "torch": torch.__version__, "records": records}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(record.get("faults") for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
