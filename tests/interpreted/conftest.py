"""Tests of the Triton kernels on the CPU: TRITON_INTERPRET=1 pytest tests/interpreted

Triton reads TRITON_INTERPRET when it is imported, so these need a run of their own; any other run passes them by.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from mimo_fast.kernels.dispatch import ENVIRONMENT

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module", autouse=True)
def triton_kernels() -> Iterator[None]:
    """Every op takes its Triton path; references are called by their own names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, "triton")
        yield
