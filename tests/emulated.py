"""The CUDA sources, compiled for the CPU with the headers in tests/kernels/cuda."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def exclusive(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """One process of this run of the tests at a time; gives a directory that all of them share."""
    directory = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def compiled_once(
    factory: pytest.TempPathFactory,
    name: str,
    sources: Sequence[Path],
    headers: Sequence[Path] = (),
) -> Path:
    """`compile_for_cpu` into NAME.so, once a run of the tests, whatever its number of processes."""
    with exclusive(factory, name) as directory:
        target = directory / f"{name}.so"
        return target if target.exists() else compile_for_cpu(sources, target, headers)
