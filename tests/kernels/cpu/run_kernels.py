"""Builds and runs kernels_test.cpp, a program without Python or torch.

    python tests/kernels/cpu/run_kernels.py                                      for this machine
    python tests/kernels/cpu/run_kernels.py --machine aarch64 \\
        --compiler aarch64-linux-gnu-g++ --run qemu-aarch64              for another, emulated
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

from cpu_build import BUILD, FLAGS, SETS, SOURCES, add_objects, default_compiler  # noqa: E402
from ninja_file import NinjaFile  # noqa: E402


def build(machine: str, compiler: str, static: bool = False) -> tuple[Path, list[Path]] | None:
    """The program and the kernels' objects, or None where it could not be built.

    static: it needs none of the other machine's libraries when it is run.
    """
    ninja = NinjaFile(BUILD / machine, "kernels_test.ninja")
    objects = add_objects(ninja, compiler, machine)
    # A reference may be slow, and compiles faster.
    flags = (
        f"{FLAGS} -O1 -I{shlex.quote(str(SOURCES))} -MMD -MF $out.d{' -static' if static else ''}"
    )
    ninja.rule("program", f"{compiler} {flags} $in -o $out", "LINK $out", depfile=True)
    program = ninja.edge(
        "kernels_test", "program", [HERE / "kernels_test.cpp", *objects], target=True
    )
    if not ninja.run():
        return None
    return ninja.directory / program, [ninja.directory / each for each in objects]


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds and runs kernels_test.cpp.")
    parser.add_argument("--machine", choices=sorted(SETS), default=platform.machine())
    parser.add_argument("--compiler", default=default_compiler())
    parser.add_argument("--run", default="", help="the emulator, with its arguments")
    parser.add_argument("sets", nargs="*", help="sets of kernels; none: all that the CPU has")
    options = parser.parse_args()
    built = build(options.machine, options.compiler, static=bool(options.run))
    if built is None:
        return 1
    command = [*shlex.split(options.run), str(built[0])]
    runs = [[*command, name] for name in options.sets] or [command]
    return max(subprocess.run(each, check=False).returncode for each in runs)


if __name__ == "__main__":
    sys.exit(main())
