"""Peak memory of a call by the operating system, which sees torch's and libsndfile's as well."""

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
    """Bytes by which resident memory grows at most during `call`; skips where Linux lacks it."""
    gc.collect()
    before = resident_memory()
    try:
        RESET.write_text("5")
    except OSError:
        pytest.skip("needs Linux's resettable peak of resident memory")
    call()
    return _bytes("VmHWM") - before


def peak_memory_alone(setup: str, expression: str) -> int:
    """`peak_memory` in a process of its own, as a long-lived one's heap is fragmented."""
    peak_memory(lambda: None)
    script = f"from memory import peak_memory\n{setup}\nprint(peak_memory(lambda: {expression}))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(done.stdout)


def resident_memory() -> int:
    """Bytes in memory now, without what the allocator merely keeps; skips where Linux lacks it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _bytes("VmRSS")
    except (OSError, AttributeError, TypeError):
        pytest.skip("needs Linux's account of resident memory")


def _bytes(key: str) -> int:
    _, _, after = STATUS.read_text().partition(f"\n{key}:")
    return int(after.split()[0]) * 1024
