"""Which files of csrc/cpu are compiled how often and with which flags."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from ninja_file import NinjaFile

SOURCES = Path(__file__).resolve().parent / "cpu"

BUILD = SOURCES.parent.parent / "build" / "native"
"""Objects stay here, so that a later build compiles only what has changed."""

SETS = {
    "x86_64": {
        "avx2": "-mavx2 -mfma -mf16c",
        # gcc 12 warns of its own headers.
        "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
        " -Wno-maybe-uninitialized",
        "portable": "",
    },
    "aarch64": {"neon": "", "portable": ""},
}
"""Instruction sets of a machine and the flags of their kernels; instruction_set.cpp chooses."""

SHARED = ("codec_tables", "instruction_set", "threads")
"""Compiled once; every other file once a set."""

BINDINGS = ("bindings", "bind_codec")
"""Python's view of them: compiled once, of the extension module alone."""

# Without contraction a sum is rounded as it is written, in every set.
FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -Wall -Wextra"


def default_compiler() -> str | None:
    """$CXX or the one on the path; None for none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def add_objects(ninja: NinjaFile, compiler: str, machine: str) -> list[str]:
    """Edges for the kernels of every set and for what chooses one; returns the objects.

    compiler: command and flags.
    """
    ninja.rule(
        "cxx", f"{compiler} {FLAGS} $flags -MMD -MF $out.d -c $in -o $out", "CXX $out", depfile=True
    )
    objects = [
        ninja.edge(f"{name}/{source.stem}.o", "cxx", [source], {"flags": _flags(name, flags)})
        for name, flags in SETS[machine].items()
        for source in sorted(SOURCES.glob("*.cpp"))
        if source.stem not in (*SHARED, *BINDINGS)
    ]
    return objects + [ninja.edge(f"{name}.o", "cxx", [SOURCES / f"{name}.cpp"]) for name in SHARED]


def add_extension(
    ninja: NinjaFile, compiler: str, machine: str, includes: Sequence[str], output: str
) -> None:
    """Edges for Python's extension module, under the name `output`."""
    objects = add_objects(ninja, compiler, machine)
    flags = " ".join(f"-I{shlex.quote(path)}" for path in includes)
    bindings = [
        ninja.edge(f"{name}.o", "cxx", [SOURCES / f"{name}.cpp"], {"flags": flags})
        for name in BINDINGS
    ]
    # torch has loaded an OpenMP before: the kernels use its threads. `now` turns a missing one into
    # an ImportError.
    ninja.rule("link", f"{compiler} -shared -fopenmp $in -o $out -Wl,-z,now", "LINK $out")
    ninja.edge(output, "link", [*bindings, *objects], target=True)


def _flags(name: str, flags: str) -> str:
    return f"-DMIMO_FAST_SET={name} -DMIMO_FAST_{name.upper()} {flags}".strip()
