"""Products of a prompt's rows on the CPU beside its integer peak, without Python or torch.

    python -m benchmarks.studies.cpu_prompts --csrc before=PATH/csrc --csrc after=csrc --out FILE

The peak is the rate of vpdpbusd (AVX-512), or of vpmaddwd with the vpaddd that sums it (AVX2), on
registers alone, measured before and after each product in the same process on as many threads; a
product of a 16-bit x with a weight is two of bytes. Of a product and of the peak the best of
several tries counts, since other programs share the machine. Slices of the 7B model's matrices on
one core are short enough not to be interrupted; whole matrices are on all cores. Sources are
compared by checksums of the results: they must have the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.studies.common import Record, collect, parser_of
from mimo_fast.bench.environment import commit

HERE = Path(__file__).resolve().parent

SHAPES = {
    "qkv": (6144, 4096, False),
    "out": (4096, 4096, False),
    "gate_up": (22016, 4096, True),
    "down": (4096, 11008, False),
}
"""Of a layer of the backbone: N, K, SwiGLU."""

SLICE = 512
ROWS = (64, 256)

BUILD = """
import platform, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import cpu_build
from ninja_file import NinjaFile
ninja = NinjaFile(cpu_build.BUILD / platform.machine(), "cpu_prompts.ninja")
objects = cpu_build.add_objects(ninja, cpu_build.default_compiler(), platform.machine())
flags = f"{cpu_build.FLAGS} -mavx512f -I{cpu_build.SOURCES}"
ninja.rule("program", f"{cpu_build.default_compiler()} {flags} $in -o $out", "LINK $out")
program = ninja.edge("cpu_prompts", "program", [Path(sys.argv[2]), *objects], target=True)
assert ninja.run()
print(ninja.directory / program)
"""


def build(csrc: Path) -> str:
    """The program with the kernels of a `csrc` folder."""
    command = [sys.executable, "-c", BUILD, str(csrc.resolve()), str(HERE / "cpu_prompts.cpp")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def measure(
    programs: dict[str, str], rows_of_x: list[int], tries: int, whole: bool
) -> Iterator[Record]:
    for name, (n, k, swiglu) in SHAPES.items():
        if name == "qkv" and not whole:
            # Its slices are those of "out".
            continue
        for rows in rows_of_x:
            for bits in (4, 8):
                for instructions in ("avx512", "avx2"):
                    yield from one(
                        programs, name, (instructions, bits, rows, n, k, swiglu), tries, whole
                    )


def one(
    programs: dict[str, str],
    name: str,
    what: tuple[str, int, int, int, int, bool],
    tries: int,
    whole: bool,
) -> Iterator[Record]:
    instructions, bits, rows, n, k, swiglu = what
    threads = len(os.sched_getaffinity(0)) if whole else 1
    shape = [instructions, bits, rows, n if whole else SLICE, k, int(swiglu), threads, tries]
    sums = set()
    for source, program in programs.items():
        done = subprocess.run(
            [program, *map(str, shape)], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout)
        sums.add(found["checksum"])
        faults = ["bits differ between sources"] if len(sums) > 1 else []
        yield {
            "source": source,
            "product": name,
            **found,
            "load": os.getloadavg()[0],
            "faults": faults,
        }


def line(record: Record) -> str:
    keys = ("source", "product", "set", "bits", "M", "N", "K", "threads", "share")
    return " ".join(str(record[key]) for key in keys) + " " + " ".join(record["faults"])


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--csrc", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--whole", action="store_true", help="whole matrices on all cores")
    parser.add_argument("--out", type=Path)
    options: argparse.Namespace = parser.parse_args()
    sources = dict(each.split("=", 1) for each in options.csrc)
    programs = {name: build(Path(path)) for name, path in sources.items()}
    about = {**commit(), "tries": options.tries}
    return collect(
        measure(programs, options.rows, options.tries, options.whole), line, about, options.out
    )


if __name__ == "__main__":
    sys.exit(main())
