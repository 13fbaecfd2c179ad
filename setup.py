"""Metadata is in pyproject.toml; this file builds the native kernels of csrc/ by ninja, and goes on
without where it cannot."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from cpu_build import BUILD, SETS, add_extension, default_compiler  # noqa: E402
from ninja_file import NinjaFile  # noqa: E402

# Machine code for Ampere and Ada, Hopper, and Blackwell's cards; later GPUs compile the last one's
# PTX.
ARCHITECTURES = ("80", "90", "120")

machine = platform.machine()
builds = sys.platform == "linux" and machine in SETS


class BuildAll(build_ext):
    """The CPU's extension and, where nvcc is installed, the CUDA kernels as a shared object without
    Python or torch."""

    def run(self) -> None:
        super().run()
        self.build_cuda()

    def build_extension(self, ext: Extension) -> None:
        """`mimo_fast._native`, if there is a C++ compiler."""
        compiler = default_compiler()
        if compiler is None:
            print("no C++ compiler is installed: plain torch takes the place of csrc/cpu")
            return
        output = Path(self.get_ext_fullpath(ext.name))
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        ninja = NinjaFile(BUILD / machine)
        add_extension(ninja, compiler, machine, includes, output.name)
        if ninja.run():
            output.parent.mkdir(parents=True, exist_ok=True)
            # Not over the old one, which a running program may have mapped.
            output.unlink(missing_ok=True)
            shutil.copy2(ninja.directory / output.name, output)
        else:
            print(
                "warning: the CPU kernels were not built: plain torch takes their place",
                file=sys.stderr,
            )

    def build_cuda(self) -> None:
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


native = Extension("mimo_fast._native", [], optional=True)
setup(ext_modules=[native] if builds else [], cmdclass={"build_ext": BuildAll})
