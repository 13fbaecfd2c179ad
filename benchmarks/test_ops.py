"""Our ops on the CPU as pytest-benchmark tests, for its statistics, storage and comparisons:

    pytest benchmarks --benchmark-only [-k swiglu] [--benchmark-autosave] [--benchmark-compare]

Not part of the unit tests. An op whose result is wrong fails before it is timed.
"""

from itertools import cycle

import pytest
import torch

from benchmarks.harness import Case, prepare
from benchmarks.ops import select

CPU = torch.device("cpu")
LIMIT = 2**28
"""Bytes: the text head in bfloat16 would take longer to make than all else to run."""

CASES = [case for case in select(quick=True) if case.nbytes <= LIMIT]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.format} {case.shape}")
def test_op(case: Case, benchmark):
    provider = next(p for p in case.providers if p.name == "ours-cpu")
    calls, found = prepare(case, provider, case.make(CPU), CPU)
    turns = cycle(calls)
    benchmark.group = case.op
    benchmark.extra_info.update(
        bytes=case.nbytes, flop=case.flop, error=found.error, bound=found.bound
    )
    benchmark(lambda: next(turns)())
