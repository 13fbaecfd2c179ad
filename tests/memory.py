"""Peak memory of a call, as the operating system sees it: torch and libsndfile allocate outside Python's accounts."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which resident memory grows at most during `call`; skips the test where this cannot be measured."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
    except (OSError, AttributeError, TypeError):
        pytest.skip("needs Linux's resettable peak of resident memory")
    before = _kilobytes("VmRSS")
    call()
    return (_kilobytes("VmHWM") - before) * 1024


def resident_memory() -> int:
    """Bytes of the process that are in memory now, without what the allocator merely keeps; skips as above."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _kilobytes("VmRSS") * 1024
    except (OSError, AttributeError):
        pytest.skip("needs Linux's account of resident memory")


def _kilobytes(key: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
