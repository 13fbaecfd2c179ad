"""Products of a prompt's rows with a layer of the backbone on a CPU, beside its integer peak.

Each instruction set that has tiles is measured in a process of its own, on one core and on all of
them: whole matrices of the published dimensions in int4 and int8, 16-bit activations. Of a product
and of the peak (mimo_fast/bench/integers.py) the best of several tries counts, so that a share is
low where other programs used the machine; its load average is in the record.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.columns import COLUMNS, Table
from benchmarks.records import JsonLines
from benchmarks.synthetic import random_weight
from mimo_fast.bench.environment import ROOT, environment
from mimo_fast.bench.integers import PROMPT_ROWS, Matrix, rates
from mimo_fast.bench.machine import usable_cores
from mimo_fast.bench.synthetic import preset_configs
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight

FORMATS = "int4", "int8"
SETS = "avx512", "avx2"
"""Those with tiles for many rows."""

TRIES = 20


def add_options(add: Callable[..., object]) -> None:
    add("--sets", nargs="+", choices=SETS, help="instruction sets [all that the CPU has]")
    add("--formats", nargs="+", default=FORMATS, metavar="FORMAT")
    add("--rows", type=int, nargs="+", default=PROMPT_ROWS)
    add("--threads", type=int, nargs="+", help="[one, and as many as there are cores]")
    add("--tries", type=int, default=TRIES)
    add("-o", "--output", type=Path, metavar="FILE.jsonl", help="append a record for each product")


def run(args: argparse.Namespace) -> int:
    """Measures in this process where it has the one set that is asked for, else in others."""
    if not native.available():
        raise ValueError(f"the native kernels are {native.state()}")
    known = [name for name in native.compiled().instruction_sets() if name in SETS]
    chosen = args.sets or known
    if missing := [name for name in chosen if name not in known]:
        raise ValueError(f"this CPU has no {missing[0]}")
    if not chosen:
        raise ValueError("this CPU has no instruction set with tiles for many rows")
    if chosen == [native.compiled().instruction_set()]:
        _measure(args)
        return 0
    return max(_in_set(args, name) for name in chosen)


def products() -> dict[str, tuple[tuple[int, ...], int, bool]]:
    """Name -> blocks of rows, columns, SwiGLU, of a layer of the published dimensions."""
    config = preset_configs("7b")[0].backbone
    queries, keys = (heads * config.head_dim for heads in (config.heads, config.kv_heads))
    return {
        "qkv": ((queries, keys, keys), config.dim, False),
        "out": ((config.dim,), queries, False),
        "gate_up": ((config.ffn_dim, config.ffn_dim), config.dim, True),
        "down": ((config.dim,), config.ffn_dim, False),
    }


def _in_set(args: argparse.Namespace, name: str) -> int:
    options: list[object] = ["--sets", name, "--formats", *args.formats, "--rows", *args.rows]
    options += ["--threads", *args.threads] if args.threads else []
    options += ["--tries", args.tries]
    options += ["-o", args.output.resolve()] if args.output else []
    command = [sys.executable, "-m", "benchmarks", "prompts", *map(str, options)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, native.INSTRUCTION_SET: name}, check=False
    ).returncode


def _measure(args: argparse.Namespace) -> None:
    lines, table = JsonLines(args.output), Table(COLUMNS["prompt"])
    before = torch.get_num_threads()
    try:
        for threads in args.threads or sorted({1, usable_cores()}):
            torch.set_num_threads(threads)
            for record in _records(args):
                table.row(record)
                lines.append(record)
    finally:
        torch.set_num_threads(before)


def _records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for form, (name, (blocks, columns, swiglu)) in itertools.product(
        args.formats, products().items()
    ):
        weight = random_weight(form, blocks, columns, torch.bfloat16)
        assert isinstance(weight, QuantizedWeight)
        for rows in args.rows:
            found = rates(Matrix(weight, swiglu), rows, torch.bfloat16, args.tries)
            yield {
                "kind": "prompt",
                "environment": environment("cpu"),
                "instructions": native.compiled().instruction_set(),
                "threads": torch.get_num_threads(),
                "product": name,
                "quantization": form,
                "rows": rows,
                "shape": f"N={sum(blocks)} K={columns}",
                "reached": found.reached,
                "peak": found.peak,
                "share": found.share,
            }
