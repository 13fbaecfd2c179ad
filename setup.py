"""Metadata is in pyproject.toml; this file builds the native kernels of csrc/, and goes on without where it cannot."""

import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# torch has loaded an OpenMP before: the kernels use its threads. `now` turns a missing one into an ImportError.
native = Pybind11Extension(
    "mimo_fast._native", sorted(map(str, Path("csrc").glob("*.cpp"))), depends=[*map(str, Path("csrc").glob("*.h"))],
    cxx_std=17, extra_compile_args=["-O3", "-fopenmp", "-Wall", "-Wextra"], extra_link_args=["-Wl,-z,now"],
    optional=True,
)  # fmt: skip
built = sys.platform == "linux" and platform.machine() == "x86_64"

setup(ext_modules=[native] if built else [], cmdclass={"build_ext": build_ext})
