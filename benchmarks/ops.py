"""The registry: which cases there are, and the command that measures them.

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
from pathlib import Path
from types import FunctionType

import torch

import mimo_fast.kernels
from benchmarks.harness import Case, print_outcome, run_cases
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


def all_cases(missing: dict[str, str] | None = None) -> list[Case]:
    """Every case, those of one op and format together.

    missing: takes the reason why an op has no cases, as where the package is older; None makes that
    an error.
    """
    found: list[Case] = []
    for name, make in families():
        try:
            found += make()
        except (ImportError, AttributeError) as error:
            if missing is None:
                raise
            missing[name] = str(error).partition(" (/")[0]
    return found


def families() -> Iterator[tuple[str, Callable[[], list[Case]]]]:
    """Name and maker of the cases of each op."""

    def products() -> list[Case]:
        module = importlib.import_module("benchmarks.products")
        return [
            module.product_case(product, form, m)
            for product in module.products()
            for form in product.formats
            for m in product.rows
        ]

    yield "matmul", products
    for make, arguments in importlib.import_module("benchmarks.cases").table():
        yield (
            make.__name__,
            lambda make=make, arguments=arguments: [
                case for each in arguments if (case := make(*each)) is not None
            ],
        )


def select(
    op: str = "*",
    rows: Sequence[int] | None = None,
    formats: str = "*",
    *,
    quick: bool = False,
    missing: dict[str, str] | None = None,
) -> list[Case]:
    """Cases whose op and format match the globs, at the given M (all by default).

    quick: one M, and few providers. missing: as for `all_cases`.

    Raises:
        ValueError: there is no such case; the message lists what there is.
    """
    cases = all_cases(missing)
    found = [case for case in cases if fnmatch(case.op, op) and fnmatch(case.format, formats)]
    if not found:
        names = ", ".join(dict.fromkeys(case.op for case in cases))
        raise ValueError(f"no op matches {op!r} in format {formats!r}; there are {names}")
    if rows is not None:
        chosen = [case for case in found if case.m in rows]
        if not chosen:
            there = sorted({case.m for case in found})
            raise ValueError(f"{op!r} is not measured at M = {list(rows)}; choose from {there}")
        return chosen
    return [_quick(case) for case in found if _is_quick(case, found)] if quick else found


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


def _is_quick(case: Case, among: Sequence[Case]) -> bool:
    """Whether a case is quick: the fewest rows; of the products that are slow on a CPU, one."""
    if case.format == "nf4" and case.op != COMPARED:
        return False
    same = (other.m for other in among if (other.op, other.format) == (case.op, case.format))
    return case.m == min(same)


def _quick(case: Case) -> Case:
    globs = COMPARED_PROVIDERS if case.op == COMPARED else QUICK_PROVIDERS
    chosen = (p for p in case.providers if any(fnmatch(p.name, glob) for glob in globs))
    return replace(case, providers=tuple(chosen))


def add_case_options(add: Callable[..., object]) -> None:
    """Adds the options that select cases and device."""
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
    cases = select(args.op, args.m, args.format, quick=args.quick)
    seconds = args.seconds if args.seconds is not None else QUICK_SECONDS if args.quick else SECONDS
    machine = ceiling(device)
    print(machine, flush=True)
    outcome = run_cases(
        cases,
        device,
        machine,
        JsonLines(args.output),
        seconds=seconds,
        providers=lambda name: any(fnmatch(name, glob) for glob in wanted),
    )
    print_outcome(outcome)
    if not outcome.records and not outcome.refused:
        print("nothing was measured: no wanted provider runs here", file=sys.stderr)
        return 1
    return 1 if outcome.refused else 0
