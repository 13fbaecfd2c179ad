"""Fixtures of the CUDA kernels' tests."""

import ctypes

import pytest
from emulated import usual_device


@pytest.fixture
def emulated(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    """The library of CUDA kernels, compiled for the CPU, on a small device."""
    return usual_device(emulated_cuda)
