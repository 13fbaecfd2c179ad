"""Metadata is in pyproject.toml; this file builds the native kernels of csrc/, and goes on without
where it cannot."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# torch has loaded an OpenMP before: the kernels use its threads. `now` turns a missing one into an
# ImportError.
native = Pybind11Extension(
    "mimo_fast._native",
    sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
    depends=[*map(str, Path("csrc/cpu").glob("*.h"))],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-Wall", "-Wextra"],
    extra_link_args=["-Wl,-z,now"],
    optional=True,
)
built = sys.platform == "linux" and platform.machine() == "x86_64"

# Machine code for Ampere and Ada, Hopper, and Blackwell's cards; later GPUs compile the last one's
# PTX.
ARCHITECTURES = ("80", "90", "120")


class BuildAll(build_ext):
    """The CPU's extension and, where nvcc is installed, the CUDA kernels as a shared object without
    Python or torch."""

    def run(self) -> None:
        super().run()
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if nvcc is None:
            print("nvcc is not installed: Triton's kernels take the place of those in csrc/cuda")
            return
        package = Path() if self.inplace else Path(self.build_lib)
        codes = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in ARCHITECTURES]
        last = ARCHITECTURES[-1]
        command = [
            nvcc,
            "-O3",
            "-std=c++17",
            "-shared",
            "--threads=0",
            "-cudart=static",
            "-Xcompiler=-fPIC",
            "-Icsrc/cuda",
            *codes,
            f"-gencode=arch=compute_{last},code=compute_{last}",
            "-o",
            str(package / "mimo_fast" / "libmimo_fast_cuda.so"),
            *sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
        ]
        if subprocess.run(command, check=False).returncode:
            print(
                "warning: the CUDA kernels were not built: Triton's take their place",
                file=sys.stderr,
            )


setup(ext_modules=[native] if built else [], cmdclass={"build_ext": BuildAll})
