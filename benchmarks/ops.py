"""The registry: every op of mimo_fast/kernels at the published dimensions, by families in ops_*.py.

An op's name begins with the part of the model that it is measured for. M is rows of x: streams at
decode, positions in prefill, frames in the codec. Formats are those of weights or caches;
activations are bfloat16, as the published checkpoints are, except where an op is float32 by
contract.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from types import FunctionType

import mimo_fast.kernels
from benchmarks.harness import Case

FAMILIES = ("ops_matmul", "ops_attention", "ops_elementwise", "ops_sampling")

COMPARED = "backbone.qkv"
"""The product for which the quick set has the other libraries too; they take as long for the
others."""

QUICK_PROVIDERS = ("ours-*", "linear")
COMPARED_PROVIDERS = (*QUICK_PROVIDERS, "eager", "torch-*", "bitsandbytes-*")
"""Of the quick set: no torch.compile, which compiles for longer than all the rest takes."""

WITHOUT_REFERENCE = ("attention",)
"""Ops that are torch's own on every device, and so have no reference beside them."""


def all_cases(missing: dict[str, str] | None = None) -> list[Case]:
    """Every case, those of one op and format together.

    missing: takes why a family cannot be imported, as where the package is older than it; None:
    that is an error.
    """
    found: list[Case] = []
    for name in FAMILIES:
        try:
            found += importlib.import_module(f"benchmarks.{name}").cases()
        except ImportError as error:
            if missing is None:
                raise
            missing[name] = str(error).partition(" (/")[0]
    return found


def select(
    op: str = "*",
    rows: Sequence[int] | None = None,
    formats: str = "*",
    *,
    quick: bool = False,
    missing: dict[str, str] | None = None,
) -> list[Case]:
    """Cases whose op and format match the globs, at the given M (all by default); quick: one M, and
    few providers.

    missing: as for `all_cases`.

    Raises:
        ValueError: there is no such case; the message tells what there is.
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
    """Names of the public ops of mimo_fast.kernels: functions with a reference beside them, and
    torch's own."""
    found = set(WITHOUT_REFERENCE)
    for module in pkgutil.walk_packages(mimo_fast.kernels.__path__, "mimo_fast.kernels."):
        members = vars(importlib.import_module(module.name))
        found |= {
            name
            for name in members
            if f"{name}_ref" in members and isinstance(members[name], FunctionType)
        }
    return found


def _is_quick(case: Case, among: Sequence[Case]) -> bool:
    """One row, or as few as the op has; of the products that are slow on a CPU, one."""
    if case.format == "nf4" and case.op != COMPARED:
        return False
    return case.m == min(
        other.m for other in among if (other.op, other.format) == (case.op, case.format)
    )


def _quick(case: Case) -> Case:
    globs = COMPARED_PROVIDERS if case.op == COMPARED else QUICK_PROVIDERS
    return replace(
        case, providers=tuple(p for p in case.providers if any(fnmatch(p.name, g) for g in globs))
    )
