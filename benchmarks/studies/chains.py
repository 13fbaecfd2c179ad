"""Which PDL trigger is best for each kernel, in the chains of a decode step?

python -m benchmarks.studies.chains [-o FILE.json] [--seconds 50]

A chain is four layers at one position, products and attention alternating, in a CUDA graph. A way
chooses

    Triton's kernels   a `PdlTrigger` each (dispatch.py): off, none, lets, first, waited, last
    carveout           whether Triton's kernels ask for the same division of a multiprocessor's
                       memory into L1 and shared memory as the products ("max"), or leave it to the
                       driver: a multiprocessor is drained before the division changes

The products of csrc/cuda are launched early and trigger ahead of their wait. Other ways were
measured on an H100 and lost (benchmarks/results/2026-11-28-h100-chains.json, where a way's name has
them): after the wait ("waited"), when a block had used all its weights ("last"), at the end of its
blocks ("end"), and not launched early themselves ("late"). Their code is gone.

All ways of a chain must give the bits of the first, in which no Triton kernel is launched early.
One line a way: us a layer (median), its change from the first, the way; best first. The best are
captured and timed once more, next to the first, and replayed often to find races. At the end, for
each family of chains: the ways by the geometric mean of their times over the family's chains.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.studies.common import Record, median_replay, write
from benchmarks.synthetic import random_weight
from mimo_fast.bench.synthetic import preset_configs
from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.decode_attention import (
    merge_splits_kernel,
    small_decode_kernel,
    split_attention_kernel,
)
from mimo_fast.kernels.dispatch import PDL_ENVIRONMENT, triton
from mimo_fast.kernels.matmul.triton_kernels import dense_gemv_kernel
from mimo_fast.kernels.norm import rms_norm_kernel
from mimo_fast.kernels.rope import rope_table
from mimo_fast.runtime.lm.state import KVCache
from mimo_fast.runtime.lm.transformer import (
    LayerWeights,
    TransformerWeights,
    cached_attend,
    transformer,
)

DEVICE, DTYPE = "cuda", torch.bfloat16
CALLS = 10
LAYERS = 4
REPLAYS = 7
RACES = 50
AGAIN = 4
"""Number of a chain's best ways that are timed once more."""

MODES = ("off", "none", "lets", "first", "waited", "last")
KERNELS = (
    merge_splits_kernel,
    small_decode_kernel,
    split_attention_kernel,
    dense_gemv_kernel,
    rms_norm_kernel,
)

SPLIT_AND_MERGE = (
    *((mode, mode) for mode in MODES),
    ("off", "none"),
    ("off", "first"),
    ("off", "last"),
    ("none", "first"),
    ("none", "off"),
    ("last", "none"),
    ("waited", "none"),
    ("first", "none"),
)


@dataclass(frozen=True)
class Way:
    kernels: str
    carveout: str = "driver"

    @property
    def name(self) -> str:
        return f"{self.kernels} carveout={self.carveout}"


@dataclass(frozen=True)
class Chain:
    family: str
    name: str
    config: TransformerConfig
    form: str
    rows: int
    length: int
    capacity: int


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), device=DEVICE).to(DTYPE)


def filled_cache(config: TransformerConfig, rows: int, capacity: int) -> KVCache:
    cache = KVCache.allocate(config, rows, capacity, DTYPE, torch.device(DEVICE))
    for part, seed in zip(cache.parts, (1, 2), strict=True):
        part.normal_(generator=generator(seed))
    return cache


def weights(config: TransformerConfig, form: str, layers: int) -> TransformerWeights:
    def product(*blocks: int, columns: int, bias: bool = False, seed: int) -> Any:
        return random_weight(form, blocks, columns, DTYPE, DEVICE, bias, seed)

    def layer(i: int) -> LayerWeights:
        attended = config.heads * config.head_dim
        kv = config.kv_heads * config.head_dim
        return LayerWeights(
            attention_norm=random(config.dim, seed=i),
            qkv=product(attended, kv, kv, columns=config.dim, bias=True, seed=4 * i),
            out=product(config.dim, columns=attended, seed=4 * i + 1),
            ffn_norm=random(config.dim, seed=i + 1),
            gate_up=product(config.ffn_dim, config.ffn_dim, columns=config.dim, seed=4 * i + 2),
            down=product(config.dim, columns=config.ffn_dim, seed=4 * i + 3),
        )

    return TransformerWeights(tuple(map(layer, range(layers))), random(config.dim, seed=99))


def chains() -> list[Chain]:
    config, _ = preset_configs("7b")
    own, steps = config.patch_decoder, config.patch_steps
    found = [
        Chain("patch decoder int8", f"rows={rows}", own, "int8", rows, 6, steps) for rows in (1, 8)
    ]
    for length, capacity in ((254, 1024), (2048, 4096)):
        for rows in (1, 8):
            name = f"length={length} rows={rows}"
            found.append(
                Chain("backbone int4", name, config.backbone, "int4", rows, length, capacity)
            )
    return [*found, Chain("patch decoder dense", "rows=1", own, "dense", 1, 6, steps)]


def ways(family: str) -> list[Way]:
    """All ways of a family; in the first no Triton kernel is launched early."""
    if family == "patch decoder dense":
        return [
            Way(f"off,small_decode={own},dense_gemv={gemv},rms_norm={norm}")
            for gemv in ("off", "none", "first", "waited", "last")
            for own in MODES
            for norm in ("off", "first")
        ]
    if family == "backbone int4":
        early = [
            f"off,split_attention={own},merge_splits={merge}" for own, merge in SPLIT_AND_MERGE
        ]
        early += ["first", "none", "last"]
    else:
        early = [f"off,small_decode={own}" for own in MODES]
        early += ["first", "none", "last", "off,small_decode=last,rms_norm=first"]
    return [Way(kernels, carveout) for carveout in ("driver", "max") for kernels in early]


def set_carveout(driver: Any, percent: int) -> None:
    """Sets the carveout of all Triton kernels that have been launched; -1: the driver's choice."""
    preferred_shared_memory_carveout = 9
    for kernel in KERNELS:
        for compiled in kernel.device_caches[torch.cuda.current_device()][0].values():
            if compiled.function is not None:
                code = driver.cuFuncSetAttribute(
                    ctypes.c_void_p(compiled.function), preferred_shared_memory_carveout, percent
                )
                if code:
                    raise RuntimeError(f"cuFuncSetAttribute returns {code}")


def runner(chain: Chain, layers: int) -> Callable[[], Tensor]:
    config = replace(chain.config, layers=layers)
    rows = chain.rows
    loaded = weights(config, chain.form, layers)
    cache = filled_cache(config, rows, chain.capacity)
    table = rope_table(config.head_dim, config.rope_theta, chain.capacity, DEVICE)
    slots = torch.arange(rows, device=DEVICE)
    starts = torch.full((rows,), chain.length - 1, device=DEVICE)
    attend = cached_attend(config, table, cache, slots, starts, chain.capacity, fixed=True)
    x = random(rows, 1, config.dim)
    return lambda: transformer(x, loaded, config.norm_eps, attend)


def captured(
    run: Callable[[], Tensor], way: Way, driver: Any
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    with patch.dict(os.environ, {PDL_ENVIRONMENT: way.kernels}):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        set_carveout(driver, 100 if way.carveout == "max" else -1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                result = run()
        # Instantiate and upload while the attributes are still set.
        graph.replay()
        torch.cuda.synchronize()
    return graph, result


def timed(graph: torch.cuda.CUDAGraph) -> float:
    """Median us a layer."""
    return median_replay(graph, REPLAYS) / CALLS / LAYERS


def study(chain: Chain, until: float, driver: Any) -> Record:
    run, rows = runner(chain, LAYERS), []
    first: Tensor | None = None
    found = ways(chain.family)
    skipped = 0
    for way in found:
        if time.monotonic() > until:
            skipped += 1
            continue
        row: Record = asdict(way) | {"way": way.name}
        try:
            graph, result = captured(run, way, driver)
            row["us"] = timed(graph)
            first = result.clone() if first is None else first
            row["same_bits"] = torch.equal(result, first)
            del graph, result
        except Exception as error:  # The other ways run even if one fails.
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    measured = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
    for row in [r for r in rows if r["way"] == found[0].name] + measured[:AGAIN]:
        if "us_again" in row or "us" not in row or time.monotonic() > until + 3:
            continue
        way = next(way for way in found if way.name == row["way"])
        graph, result = captured(run, way, driver)
        row["us_again"] = timed(graph)
        row["races"] = 0
        for _ in range(RACES):
            result.fill_(torch.nan)
            graph.replay()
            row["races"] += not torch.equal(result, first)
        del graph, result
    set_carveout(driver, -1)
    return {"family": chain.family, "chain": chain.name, "skipped": skipped, "rows": rows}


def show(record: Record) -> None:
    rows = record["rows"]
    title = f"{record['family']}, {record['chain']}"
    print(f"== {title}: us a layer; {record['skipped']} ways skipped", flush=True)
    off = rows[0].get("us", math.nan)
    for row in sorted(rows, key=lambda row: row.get("us", math.inf)):
        if "failed" in row:
            print(f"failed   {row['way']}: {row['failed']}")
            continue
        again = f" again {row['us_again']:.3f}, {row['races']} races" if "races" in row else ""
        bits = "" if row["same_bits"] else " OTHER BITS"
        print(f"{row['us']:8.3f} {row['us'] / off - 1:+7.1%}  {row['way']}{again}{bits}")


def summarize(records: list[Record]) -> dict[str, list[tuple[str, float]]]:
    """For each family: (way, mean of its time over that of the first way), best first."""
    means: dict[str, list[tuple[str, float]]] = {}
    for family in dict.fromkeys(record["family"] for record in records):
        of_family = [record for record in records if record["family"] == family]
        ratios: dict[str, list[float]] = {}
        for record in of_family:
            for row in record["rows"]:
                if "us" in row and "us" in record["rows"][0] and row["same_bits"]:
                    ratio = math.log(row["us"] / record["rows"][0]["us"])
                    ratios.setdefault(row["way"], []).append(ratio)
        complete = {way: x for way, x in ratios.items() if len(x) == len(of_family)}
        ordered = sorted((math.exp(sum(x) / len(x)), way) for way, x in complete.items())
        means[family] = [(way, ratio) for ratio, way in ordered]
        print(f"== {family}, over its {len(of_family)} chains: time over the first way's")
        for way, ratio in means[family][:12]:
            print(f"{ratio:8.4f}  {way}")
    return means


def warm(mode: str) -> None:
    """Compiles what one `PdlTrigger` needs into Triton's cache."""
    os.environ[PDL_ENVIRONMENT] = mode
    for chain in chains():
        if chain.rows == 1:
            runner(chain, 1)()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description="Early launches in the chains of a decode step.")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--seconds", type=float, default=50, help="measure no more ways after these"
    )
    parser.add_argument("--warm", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device")
    torch.set_grad_enabled(False)
    if arguments.warm:
        warm(arguments.warm)
        return 0
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.studies.chains", "--warm"]
    others = [subprocess.Popen([*command, mode]) for mode in MODES]
    codes = [other.wait() for other in others]
    compiled = time.monotonic() - start
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda_kernels": cuda.state(),
        "compile_seconds": compiled,
        "compile_codes": codes,
    }
    print(json.dumps(about), flush=True)
    driver, records, found = ctypes.CDLL("libcuda.so.1"), [], chains()
    for i, chain in enumerate(found):
        # The time that is left, in equal parts.
        now = time.monotonic()
        part = (start + arguments.seconds - now) / (len(found) - i)
        records.append(study(chain, now + part, driver))
        show(records[-1])
        torch.cuda.empty_cache()
    means = summarize(records)
    bad = [
        f"{record['family']}, {record['chain']}: {row['way']}"
        for record in records
        for row in record["rows"]
        if "failed" in row or not row["same_bits"] or row.get("races")
    ]
    end = {"seconds": time.monotonic() - start, "wrong": bad}
    print(json.dumps(end), flush=True)
    write(arguments.output, {"kind": "chains", **about, **end, "chains": records, "means": means})
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
