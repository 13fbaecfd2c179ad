"""The registry: every op of mimo_fast/kernels at the published dimensions, by families in ops_*.py.

An op's name begins with the part of the model that it is measured for. M is rows of x: streams at decode, positions in
prefill, frames in the codec. Formats are those of weights or caches; activations are bfloat16, as the published
checkpoints are, except where an op is float32 by contract.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from types import FunctionType

import mimo_fast.kernels
from benchmarks import ops_attention, ops_elementwise, ops_matmul, ops_sampling
from benchmarks.harness import Case

FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (
    ops_matmul.cases, ops_attention.cases, ops_elementwise.cases, ops_sampling.cases,
)  # fmt: skip

QUICK_ROWS = {"matmul": (1, 4), "decode_attention": (1,), "sample_text": (1,), "sample_codes": (1,)}
"""M of the quick set, by launcher; the least M of every other op."""

QUICK_PROVIDERS = ("ours-*", "eager", "linear", "torch-*", "bitsandbytes-*")
"""Without torch.compile, which compiles for longer than all the rest takes."""

WITHOUT_REFERENCE = ("attention",)
"""Ops that are torch's own on every device, and so have no reference beside them."""


def all_cases() -> list[Case]:
    """Every case, those of one op and format together."""
    return [case for family in FAMILIES for case in family()]


def select(
    op: str = "*", rows: Sequence[int] | None = None, formats: str = "*", *, quick: bool = False
) -> list[Case]:
    """Cases whose op and format match the globs, at the given M (all by default).

    Raises:
        ValueError: there is no such case; the message tells what there is.
    """
    cases = all_cases()
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
    return [case for case in found if _is_quick(case, found)] if quick else found


def launchers() -> set[str]:
    """Names of the public ops of mimo_fast.kernels: functions with a reference beside them, and torch's own."""
    found = set(WITHOUT_REFERENCE)
    for module in pkgutil.iter_modules(mimo_fast.kernels.__path__):
        members = vars(importlib.import_module(f"mimo_fast.kernels.{module.name}"))
        found |= {name for name in members if f"{name}_ref" in members and isinstance(members[name], FunctionType)}
    return found


def _is_quick(case: Case, among: Sequence[Case]) -> bool:
    least = min(other.m for other in among if (other.op, other.format) == (case.op, case.format))
    return case.m in (QUICK_ROWS.get(case.launcher) or (least,))
