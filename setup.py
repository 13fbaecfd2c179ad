"""Metadata is in pyproject.toml; this file builds the native kernels of csrc/, and goes on without where it cannot."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# torch has loaded an OpenMP before: the kernels use its threads. `now` turns a missing one into an ImportError.
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

# Machine code for Ampere and Ada, Hopper, and Blackwell's data-centre chips and cards: each also runs on later minor
# versions (80 on 86 and 89). Of the last that nvcc knows later GPUs compile the PTX.
ARCHITECTURES = ("80", "90", "100", "103", "120")

SOURCES = Path("csrc/cuda")
FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC", f"-I{SOURCES}")

NINJA = """\
nvcc = {nvcc}
flags = {flags}
rule compile
  command = $nvcc $flags $codes -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule library
  command = $nvcc -shared -cudart=static $in -o $out
"""


def known_architectures(nvcc: str) -> list[str]:
    """Those of ARCHITECTURES that this nvcc compiles for: older ones lack the latest, later ones may drop the first."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    names = listed.stdout.split()
    return [cc for cc in ARCHITECTURES if f"sm_{cc}" in names]


def ninja_file(nvcc: str, architectures: list[str], target: Path) -> str:
    """A step for each file, side by side and only where something has changed; within one, nvcc compiles for all
    architectures at once (--threads=0). The flags are part of the file, so other architectures are a change too."""
    codes = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    lines = [
        NINJA.format(nvcc=nvcc, flags=" ".join(FLAGS)),
        f"codes = --threads=0 {' '.join(codes)}",
    ]
    objects = []
    for source in sorted(SOURCES.glob("*.cu")):
        objects.append(f"build/cuda/{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {target}: library {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildAll(build_ext):
    """The CPU's extension and, where nvcc is installed, the CUDA kernels as a shared object without Python or torch."""

    def run(self) -> None:
        super().run()
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if nvcc is None:
            print("nvcc is not installed: Triton's kernels take the place of those in csrc/cuda")
            return
        package = Path() if self.inplace else Path(self.build_lib)
        if not self.build_cuda(nvcc, package / "mimo_fast" / "libmimo_fast_cuda.so"):
            print(
                "warning: the CUDA kernels were not built: Triton's take their place",
                file=sys.stderr,
            )

    @staticmethod
    def build_cuda(nvcc: str, target: Path) -> bool:
        architectures = known_architectures(nvcc)
        if not architectures:
            return False
        print(f"CUDA kernels for sm_{', sm_'.join(architectures)}")
        directory = Path("build/cuda")
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "build.ninja"
        file.write_text(ninja_file(nvcc, architectures, target), encoding="utf-8")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        return not subprocess.run([*command, "-f", str(file)], check=False).returncode


setup(ext_modules=[native] if built else [], cmdclass={"build_ext": BuildAll})
