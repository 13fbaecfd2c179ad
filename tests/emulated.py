"""The CUDA sources, compiled for the CPU with the headers in tests/kernels/cuda; and models whose
products they compute there."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_fast.kernels.cuda import engine_launch
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.defaults import ENVIRONMENT as EXPERIMENTAL
from mimo_fast.kernels.matmul import plan
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.quantization import WeightSource

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "tests" / "kernels" / "cuda"
BUILD = ROOT / "build" / "emulated"
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compile_for_cpu(sources: Sequence[Path], target: Path, headers: Sequence[Path] = ()) -> Path:
    """Compiles .cu files to a shared library; skips the test where there is no g++.

    What has been compiled before is copied: its text after all #includes, flags and compiler are
    its name in build/emulated.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    include = [f"-I{directory}" for directory in (HEADERS, *headers)]
    command = [compiler, "-x", "c++", *FLAGS, *include]
    asked = ["--version"], *(["-E", "-P", source] for source in sources)
    texts = [
        subprocess.run([*command, *what], check=True, stdout=subprocess.PIPE).stdout
        for what in asked
    ]
    digest = hashlib.sha256(b"\0".join([*texts, " ".join(FLAGS).encode()])).hexdigest()
    kept = BUILD / f"{digest[:32]}.so"
    if not kept.exists():
        part = target.with_suffix(".part")
        subprocess.run([*command, "-shared", "-fPIC", "-pthread", *sources, "-o", part], check=True)
        BUILD.mkdir(parents=True, exist_ok=True)
        place = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(part, place)
        place.replace(kept)
        return part.replace(target)
    return Path(shutil.copyfile(kept, target))


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


def usual_device(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library on a device of two multiprocessors with 99 KB of shared memory a block."""
    library.mimo_fast_set_device(2, 99 * 1024)
    return library


@contextmanager
def products_by_cuda(
    library: ctypes.CDLL, new_paths: bool = True, grid: engine_launch.Grid | None = None
) -> Iterator[Counter[str]]:
    """On a CPU, the plan of a product is a GPU's as far as the CUDA kernels take it; beyond, it is
    a CPU's. Counts products by the implementation that computed them.

    It holds for weights of models that are loaded inside, for a weight keeps its plan.

    Args:
        library: of the fixture `emulated_cuda`.
        new_paths: whether `kernels/defaults.py` has those on.
        grid: the device's, on which transformers are persistent kernels; None for none.
    """
    counts = Counter[str]()
    read = WeightSource.weight

    def joined(*arguments: Any, **options: Any) -> Any:
        """Dense row blocks are one matrix, as on a GPU."""
        weight = read(*arguments, **options)
        if not isinstance(weight, Weight) or len(weight.blocks) == 1:
            return weight
        pairs = [*zip(weight.blocks, weight.biases, strict=True)]
        biases = [block.new_zeros(len(block)) if own is None else own for block, own in pairs]
        biased = any(own is not None for own in weight.biases)
        return Weight.stack([torch.cat(weight.blocks)], [torch.cat(biases)] if biased else [])

    def counted(row: plan.Implementation) -> plan.Implementation:
        def run(*arguments: Any, **options: Any) -> Tensor:
            counts[row.name] += 1
            return row.run(*arguments, **options)

        requires = [need for need in row.requires if need is not plan.gpu_kernels]
        by_cuda = plan.cuda_takes in requires or plan.cuda_takes_dense in requires
        return replace(row, run=run, requires=tuple(requires) if by_cuda else row.requires)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EXPERIMENTAL, str(int(new_paths)))
        patch.setattr(cuda, "library", lambda: usual_device(library))
        patch.setattr(cuda, "refuses_device", lambda device: "")
        refusal = "" if grid else "it is not asked for"
        patch.setattr(engine_launch, "refuses_device", lambda device: refusal)
        patch.setattr(engine_launch, "library", lambda: engine_launch.declared(library))
        patch.setattr(engine_launch.Grid, "of", lambda device: grid)
        patch.setattr(plan, "TABLE", tuple(map(counted, plan.TABLE)))
        patch.setattr(WeightSource, "weight", joined)
        yield counts
