"""Peak memory of a call, as the operating system sees it: torch and libsndfile allocate outside
Python's accounts."""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which resident memory grows at most during `call`; skips the test where this cannot
    be measured."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
    except (OSError, AttributeError, TypeError):
        pytest.skip("needs Linux's resettable peak of resident memory")
    before = _kilobytes("VmRSS")
    call()
    return (_kilobytes("VmHWM") - before) * 1024


def peak_memory_alone(setup: str, expression: str) -> int:
    """`peak_memory` of an expression in a process of its own: a long-lived one's heap is
    fragmented. Skips as above."""
    peak_memory(lambda: None)
    script = f"from memory import peak_memory\n{setup}\nprint(peak_memory(lambda: {expression}))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(done.stdout)


def resident_memory() -> int:
    """Bytes of the process that are in memory now, without what the allocator merely keeps; skips
    as above."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _kilobytes("VmRSS") * 1024
    except (OSError, AttributeError):
        pytest.skip("needs Linux's account of resident memory")


def _kilobytes(key: str) -> int:
    return next(
        int(line.split()[1])
        for line in STATUS.read_text().splitlines()
        if line.startswith(f"{key}:")
    )
