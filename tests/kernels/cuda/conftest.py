"""Fixtures of the CUDA kernels' tests."""

import ctypes

import pytest
from emulated import usual_device

from mimo_fast.kernels.cuda.engine_launch import declared


@pytest.fixture
def emulated(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    """The library of CUDA kernels, compiled for the CPU, on a small device."""
    return usual_device(emulated_cuda)


@pytest.fixture
def engine(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    """The same with the functions of the persistent kernel."""
    emulated_cuda.set_looks_in_vain(4)
    return declared(emulated_cuda)
