"""Which files of csrc/cuda are compiled, and for which architectures: those that the nvcc at hand
knows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Choice:
    """What an nvcc builds.

    Args:
        compiler: "nvcc" and its version.
        architectures: those of ARCHITECTURES that are asked for and that it compiles for.
        left_out: architecture, or other name that was asked for -> why it is not built.
    """

    compiler: str
    architectures: list[str]
    left_out: dict[str, str]

    def line(self) -> str:
        """What is built and what is not, for `mimo-fast info`."""
        built = " ".join(f"sm_{each}" for each in self.architectures)
        missing = "".join(f"; not for sm_{name}: {why}" for name, why in self.left_out.items())
        return f"built by {self.compiler} for {built}{missing}"


def choose(nvcc: str) -> Choice:
    """For which architectures: older compilers lack the newest, and newer ones drop the oldest."""
    known = _listed(nvcc)
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    compiler = f"nvcc {release[1]}" if release else "nvcc"
    wanted = os.environ.get(CHOICE, "").replace(",", " ").split()
    asked = [each.removeprefix("sm_").replace(".", "") for each in wanted] or list(ARCHITECTURES)
    left_out: dict[str, str] = {}
    for each in dict.fromkeys([*ARCHITECTURES, *asked]):
        if each not in ARCHITECTURES:
            left_out[each] = f"{CHOICE} takes {' '.join(ARCHITECTURES)}"
        elif each not in asked:
            left_out[each] = f"{CHOICE} leaves it out"
        elif f"sm_{each}" not in known:
            left_out[each] = f"{compiler} does not compile for it"
    return Choice(compiler, [each for each in ARCHITECTURES if each not in left_out], left_out)


def known_architectures(nvcc: str) -> list[str]:
    """Those of ARCHITECTURES that are asked for and that this nvcc compiles for."""
    return choose(nvcc).architectures


def _listed(nvcc: str) -> set[str]:
    """The sm_NN that it knows; before CUDA 11.5 only its help names them."""
    return set(_output(nvcc, "--list-gpu-code").split()) or set(
        re.findall(r"\bsm_\d+\b", _output(nvcc, "--help"))
    )


def _output(nvcc: str, option: str) -> str:
    result = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else ""


def add_library(ninja: NinjaFile, nvcc: str, choice: Choice, output: str) -> None:
    """Edges for the shared object, which needs neither Python nor torch, and states for which
    architectures it was built. nvcc compiles a file for all at once (--threads=0)."""
    codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in choice.architectures]
    last = choice.architectures[-1]
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
    stated = _written(ninja.directory / "build.cpp", choice)
    objects.append(ninja.edge("build.o", "nvcc", [stated]))
    ninja.rule("nvlink", f"{nvcc} -shared -cudart=static $in -o $out", "LINK $out")
    ninja.edge(output, "nvlink", objects, target=True)


def _written(path: Path, choice: Choice) -> Path:
    """The source of `mimo_fast_build`, written only where it changes: ninja looks at times."""
    # A JSON string of ASCII is a C string too.
    text = f'extern "C" const char* mimo_fast_build() {{ return {json.dumps(choice.line())}; }}\n'
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path
