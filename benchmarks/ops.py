"""The registry: which benchmarks there are, and the command that measures them.

python -m benchmarks ops --op 'backbone.*' --m 1 4 -o FILE.jsonl
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from itertools import starmap
from pathlib import Path
from types import FunctionType

import torch

import mimo_fast.kernels
from benchmarks.harness import Benchmark, run_benchmarks
from benchmarks.records import JsonLines
from mimo_fast.bench.ceiling import ceiling

SECONDS, QUICK_SECONDS = 0.5, 0.1
"""Seconds of measuring for each row."""

COMPARED = "backbone.qkv"
"""The product for which the quick set has other libraries too.

They take as long for the others.
"""

QUICK_PROVIDERS = ("ours-*", "linear")
COMPARED_PROVIDERS = (*QUICK_PROVIDERS, "eager", "torch-*", "bitsandbytes-*")
"""Providers of the quick set: torch.compile compiles for longer than all the rest takes."""

WITHOUT_REFERENCE = ("attention",)
"""Ops that are torch's own on every device, and so have no separate reference."""


def all_benchmarks(missing: dict[str, str] | None = None) -> list[Benchmark]:
    """Every benchmark, those of one op and format together.

    missing: takes the reason why an op has none, as where the package is older; None makes that an
    error.
    """
    found: list[Benchmark] = []
    table = importlib.import_module("benchmarks.cases").table()
    families = [(make.__name__, starmap(make, arguments)) for make, arguments in table]
    for name, made in [("matmul", _products()), *families]:
        try:
            found += [benchmark for benchmark in made if benchmark is not None]
        except (ImportError, AttributeError) as error:
            if missing is None:
                raise
            missing[name] = str(error).partition(" (/")[0]
    return found


def _products() -> Iterator[Benchmark]:
    yield from importlib.import_module("benchmarks.products").benchmarks()


def select(
    op: str = "*",
    rows: Sequence[int] | None = None,
    formats: str = "*",
    *,
    quick: bool = False,
    missing: dict[str, str] | None = None,
) -> list[Benchmark]:
    """Benchmarks whose op and format match the globs, at the given M (all by default).

    quick: the fewest rows, few providers and, of the products that are slow on a CPU, one. missing:
    as for `all_benchmarks`.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    every = all_benchmarks(missing)
    found = [one for one in every if fnmatch(one.op, op) and fnmatch(one.format, formats)]
    if not found:
        names = ", ".join(dict.fromkeys(one.op for one in every))
        raise ValueError(f"no op matches {op!r} in format {formats!r}; there are {names}")
    if rows is not None:
        chosen = [one for one in found if one.m in rows]
        if not chosen:
            there = sorted({one.m for one in found})
            raise ValueError(f"{op!r} is not measured at M = {list(rows)}; choose from {there}")
        return chosen
    if not quick:
        return found
    fewest: dict[tuple[str, str], int] = {}
    for one in found:
        key = one.op, one.format
        fewest[key] = min(one.m, fewest.get(key, one.m))
    return [
        replace(one, providers=tuple(p for p in one.providers if _is_quick(p.name, one.op)))
        for one in found
        if one.m == fewest[one.op, one.format] and (one.format != "nf4" or one.op == COMPARED)
    ]


def _is_quick(provider: str, op: str) -> bool:
    globs = COMPARED_PROVIDERS if op == COMPARED else QUICK_PROVIDERS
    return any(fnmatch(provider, glob) for glob in globs)


def launchers() -> set[str]:
    """Names of the public ops of mimo_fast.kernels.

    They are functions with a reference beside them, and torch's own.
    """
    found = set(WITHOUT_REFERENCE)
    for module in pkgutil.walk_packages(mimo_fast.kernels.__path__, "mimo_fast.kernels."):
        members = vars(importlib.import_module(module.name))
        functions = {name for name in members if isinstance(members[name], FunctionType)}
        found |= {name for name in functions if f"{name}_ref" in members}
    return found


def add_case_options(add: Callable[..., object]) -> None:
    """Adds the options that select benchmarks and device."""
    add("--op", default="*", metavar="GLOB", help="such as 'backbone.*' or '*.qkv'")
    add("--format", default="*", metavar="GLOB", help="dense, int8, int4, nf4, bfloat16, ...")
    add("--m", type=int, nargs="+", metavar="M", help="rows [all that the op is measured at]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="of torch on the CPU [one a core]")
    add("-o", "--output", type=Path, metavar="FILE.jsonl", help="append a record for each row")


def add_options(add: Callable[..., object]) -> None:
    add_case_options(add)
    add("--provider", action="append", metavar="GLOB", help="such as 'ours-*'; may be repeated")
    add("--quick", action="store_true", help="few rows, short runs, no torch.compile")
    seconds = f"for each row [{SECONDS}, quick {QUICK_SECONDS}]"
    add("--seconds", type=float, help=seconds)


def run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, wanted = torch.device(args.device), args.provider or ["*"]
    chosen = select(args.op, args.m, args.format, quick=args.quick)
    seconds = args.seconds if args.seconds is not None else QUICK_SECONDS if args.quick else SECONDS
    machine = ceiling(device)
    print(machine, flush=True)
    outcome = run_benchmarks(
        chosen,
        device,
        machine,
        JsonLines(args.output),
        seconds=seconds,
        providers=lambda name: any(fnmatch(name, glob) for glob in wanted),
    )
    if not outcome.records and not outcome.refused:
        print("nothing was measured: no wanted provider runs here", file=sys.stderr)
        return 1
    return 1 if outcome.refused else 0
