"""Products with quantized weights on a CPU: torch's packed products against unpacking, and against memory.

    python -m benchmarks.cpu_qmatmul [FILE.json]

Times are [least, median] in milliseconds of several runs. "cpu" is processor time on one thread, which a busy machine
distorts little; "wall" is elapsed time on two threads of what is one parallel region, whose median is as far from the
least as the machine was busy. Runs of different products alternate, so that all see the same machine.
"""

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mimo_fast
from mimo_fast.config import LMConfig, read_json
from mimo_fast.kernels.qmatmul_cpu import pack_for_torch, packed_product, unpacked_product
from mimo_fast.kernels.quantized_weight import QuantizedWeight, dequantize_to
from mimo_fast.layout import lm_shapes
from mimo_fast.machine import describe_machine
from mimo_fast.quantization import Format, QuantizationConfig, quantize

SHAPES = ((4096, 6144), (4096, 22016), (11008, 4096))
ROWS = {1: (1, 4, 32, 128, 512), 2: (1,)}
"""Of x, by threads."""

SECONDS = 0.3
"""For the runs of one case; at least 2 and at most 10 of each product are made."""


def measure(products: dict[str, Callable[[], Tensor]], clock: Callable[[], float]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in products}
    started = perf_counter()
    for count in range(10):
        if count >= 2 and perf_counter() - started > SECONDS:
            break
        for name, product in products.items():
            start = clock()
            product()
            times[name].append(1e3 * (clock() - start))
    return {name: [round(min(found), 3), round(statistics.median(found), 3)] for name, found in times.items()}


def bandwidth() -> dict[str, list[float]]:
    """GB/s [most, median] of reading 1 GiB, and of copying it, counted twice."""
    source = torch.ones(2**28)
    target = torch.empty_like(source)
    times = measure({"sum": source.sum, "copy": lambda: target.copy_(source)}, perf_counter)
    moved = {"sum": 2**30, "copy": 2**31}
    return {name: [round(moved[name] / 1e6 / time, 1) for time in found] for name, found in times.items()}


def cases(weight: QuantizedWeight, rows: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    packed = pack_for_torch(weight)
    x = torch.randn(rows, weight.shape[1]).to(dtype)
    products = {"unpacked": lambda: unpacked_product(x, weight)}
    if rows <= 4:
        dense = dequantize_to(weight, dtype)
        products["dense"] = lambda: F.linear(x, dense)
    if packed.torch_scales is not None:
        scales = packed.torch_scales.to(dtype)
        products["unpacked from torch's form"] = lambda: unpacked_product(x, packed)
        if dtype == torch.bfloat16 or rows <= 4:
            products["packed"] = lambda: packed_product(x, replace(packed, bias=None), scales)
    return products


def bytes_held(quantization: str) -> int:
    """Of the 7B language model in bfloat16 on a CPU: matrices in torch's form, embeddings unpacked, the rest dense."""
    preset = Path(mimo_fast.__file__).parent / "presets" / "7b-lm.json"
    chosen, total = QuantizationConfig.parse(quantization), 0
    assert chosen is not None
    for name, shape in lm_shapes(LMConfig.from_dict(read_json(preset))).items():
        values = math.prod(shape)
        form = None if name.startswith("model.embed_tokens.") else chosen.format_of(name, shape)
        if form is None:
            total += 2 * values
        else:
            # Scales and zeros of 2 bytes each, and for int4 both once more in torch's form.
            total += values * form.bits // 8 + values // (form.group or shape[1]) * (8 if form.bits == 4 else 4)
    return total


def main() -> None:
    torch.set_num_threads(2)
    record: dict[str, Any] = {
        "machine": [*describe_machine()], "load_before": os.getloadavg(), "gb_per_s_two_threads": bandwidth(),
        "bytes_held_7b_lm": {name: bytes_held(name) for name in ("int8", "int4")},
    }
    generator = torch.Generator().manual_seed(0)
    for columns, outputs in SHAPES:
        dense = torch.randn(outputs, columns, generator=generator)
        for name in ("int4", "int8", "nf4"):
            weight = quantize(dense, Format.parse(name))
            for dtype in (torch.bfloat16, torch.float32):
                for threads, clock in ((1, thread_time), (2, perf_counter)):
                    torch.set_num_threads(threads)
                    for rows in ROWS[threads] if name != "nf4" else (1,):
                        key = f"{name} K={columns} N={outputs} {str(dtype).removeprefix('torch.')} M={rows}"
                        products = cases(weight, rows, dtype)
                        if threads == 2:
                            products = {form: products[form] for form in ("packed", "dense") if form in products}
                        times = measure(products, clock)
                        record.setdefault(("cpu", "wall")[threads - 1], {})[key] = times
                        print(key, threads, times, file=sys.stderr, flush=True)
    record["load_after"] = os.getloadavg()
    # Pairs of times on one line.
    text = re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(record, indent=1)) + "\n"
    print(text, end="")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
