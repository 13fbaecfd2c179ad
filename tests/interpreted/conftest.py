"""Tests of the Triton kernels on the CPU: TRITON_INTERPRET=1 pytest tests/interpreted

Triton reads TRITON_INTERPRET when it is imported, so these need a run of their own; any other run
passes them by.
"""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from launch_counter import Launches

from mimo_fast.kernels import decode_attention
from mimo_fast.kernels.dispatch import ENVIRONMENT
from mimo_fast.kernels.matmul import launch

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module", autouse=True)
def triton_kernels() -> Iterator[None]:
    """Every op takes its Triton path; references are called by their own names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, "triton")
        yield


@pytest.fixture(scope="module")
def few_programs() -> Iterator[None]:
    """Taller tiles and fewer splits than a launch takes, for whole models: the interpreter takes
    milliseconds a program. Each kernel's own tests take its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "gemv_block_n", lambda *args: 64)
        patch.setattr(decode_attention, "SPLITS", ((10**9, 4),))
        yield


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The interpreter has no bfloat16."""
    return request.param


@pytest.fixture(params=[False, True], ids=["float", "int8"])
def quantized(request: pytest.FixtureRequest) -> bool:
    """Whether a cache holds int8."""
    return request.param


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Memory that a launcher allocates holds NaN or a large negative integer until written."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -(10**9))

        return allocated

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poison(getattr(torch, name)))
        yield


@pytest.fixture
def grids_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """(module, names of kernels) -> the grids of their launches from here on."""
    launched: list[Any] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(grid)
            return self.kernel[grid]

    def count(module: Any, *names: str) -> list[Any]:
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name)))
        return launched

    return count


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts kernels from here on, and runs none."""
    counted = Launches()

    def run(kernel: Any, **_arguments: Any) -> None:
        counted.names.append(kernel.__name__)

    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return counted
