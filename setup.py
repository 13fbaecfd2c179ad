"""Metadata is in pyproject.toml; this file builds the native kernels of csrc/ by ninja, and goes on
without where it cannot."""

import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import cpu_build  # noqa: E402
import cuda_build  # noqa: E402
from ninja_file import NinjaFile  # noqa: E402

machine = platform.machine()
builds = sys.platform == "linux" and machine in cpu_build.SETS


class BuildAll(build_ext):
    """The CPU's extension and, where nvcc is installed, the CUDA kernels as a shared object without
    Python or torch."""

    def run(self) -> None:
        super().run()
        self.build_cuda()

    def build_extension(self, ext: Extension) -> None:
        """`mimo_fast._native`, if there is a C++ compiler."""
        compiler = cpu_build.default_compiler()
        if compiler is None:
            print("no C++ compiler is installed: plain torch takes the place of csrc/cpu")
            return
        output = Path(self.get_ext_fullpath(ext.name))
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        ninja = NinjaFile(cpu_build.BUILD / machine)
        cpu_build.add_extension(ninja, compiler, machine, includes, output.name)
        _install(ninja, output, "CPU kernels were not built: plain torch takes their place")

    def build_cuda(self) -> None:
        """`libmimo_fast_cuda.so`, if there is an nvcc."""
        nvcc = cuda_build.find_nvcc()
        if nvcc is None:
            print("no nvcc, or none wanted: Triton's kernels take the place of csrc/cuda")
            return
        package = Path() if self.inplace else Path(self.build_lib)
        output = package / "mimo_fast" / "libmimo_fast_cuda.so"
        choice = cuda_build.choose(nvcc)
        if not choice.architectures:
            _warn(f"{nvcc} compiles for none of the architectures that are wanted")
            return
        print(f"CUDA kernels: {choice.line()}")
        ninja = NinjaFile(cuda_build.BUILD)
        cuda_build.add_library(ninja, nvcc, choice, output.name)
        _install(ninja, output, "CUDA kernels were not built: Triton's take their place")


def _install(ninja: NinjaFile, output: Path, otherwise: str) -> None:
    """Builds, and puts the result in its place."""
    if not ninja.run():
        _warn(otherwise)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Not over the old one, which a running program may have mapped.
    output.unlink(missing_ok=True)
    shutil.copy2(ninja.directory / output.name, output)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


native = Extension("mimo_fast._native", [], optional=True)
setup(ext_modules=[native] if builds else [], cmdclass={"build_ext": BuildAll})
