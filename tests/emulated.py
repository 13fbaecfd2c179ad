"""The CUDA sources, compiled for the CPU with the headers in tests/kernels/cuda."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "tests" / "kernels" / "cuda"
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compile_for_cpu(sources: Sequence[Path], target: Path, headers: Sequence[Path] = ()) -> Path:
    """Compiles .cu files to a shared library; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    include = [f"-I{directory}" for directory in (HEADERS, *headers)]
    command = [compiler, "-x", "c++", *FLAGS, "-shared", "-fPIC", "-pthread", *include]
    part = target.with_suffix(".part")
    subprocess.run([*command, *sources, "-o", part], check=True)
    return part.replace(target)


def compiled_once(
    factory: pytest.TempPathFactory,
    name: str,
    sources: Sequence[Path],
    headers: Sequence[Path] = (),
) -> Path:
    """`compile_for_cpu` into NAME.so, once a run of the tests, whatever its number of processes."""
    directory = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    target = directory / f"{name}.so"
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return target if target.exists() else compile_for_cpu(sources, target, headers)
