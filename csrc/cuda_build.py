"""Which files of csrc/cuda are compiled, and for which architectures: those that the nvcc at hand
knows."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ninja_file import NinjaFile

SOURCES = Path(__file__).resolve().parent / "cuda"

BUILD = SOURCES.parent.parent / "build" / "cuda"

ARCHITECTURES = ("80", "90", "100", "103", "120")
"""Ampere and Ada, Hopper, Blackwell's data-centre chips and its cards. Machine code also runs on
later minor versions (80 on 86 and 89); GPUs after the last compile its PTX."""

CHOICE = "MIMO_FAST_CUDA_ARCHITECTURES"
"""Environment variable that names some of ARCHITECTURES ("80 90"), or "none"; all by default."""

FLAGS = f"-O3 -std=c++17 -Xcompiler=-fPIC -I{SOURCES}"


def find_nvcc() -> str | None:
    """The one of $CUDA_HOME, else the one on the path; None for none, or where none is wanted."""
    if os.environ.get(CHOICE) == "none":
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def known_architectures(nvcc: str) -> list[str]:
    """Those of ARCHITECTURES that are asked for and that this nvcc compiles for: older ones lack
    the newest, and newer ones drop the oldest."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False
    ).stdout.split()
    wanted = os.environ.get(CHOICE, "").replace(",", " ").split() or ARCHITECTURES
    return [each for each in ARCHITECTURES if each in wanted and f"sm_{each}" in listed]


def add_library(ninja: NinjaFile, nvcc: str, architectures: list[str], output: str) -> None:
    """Edges for the shared object, which needs neither Python nor torch. nvcc compiles a file for
    all architectures at once (--threads=0)."""
    codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    last = architectures[-1]
    codes.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    ninja.rule(
        "nvcc",
        f"{nvcc} {FLAGS} --threads=0 {' '.join(codes)} -MMD -MF $out.d -c $in -o $out",
        "NVCC $out",
        depfile=True,
    )
    objects = [
        ninja.edge(f"{source.stem}.o", "nvcc", [source]) for source in sorted(SOURCES.glob("*.cu"))
    ]
    ninja.rule("nvlink", f"{nvcc} -shared -cudart=static $in -o $out", "LINK $out")
    ninja.edge(output, "nvlink", objects, target=True)
