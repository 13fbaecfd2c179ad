"""Measures on a GPU the persistent engine (csrc/cuda/engine.cu) and what it depends on.

    python -m benchmarks.studies.engine

    exchange, stream, phases    microbenchmarks (engine_micro.py)
    engine-int8, engine-int4    patch decoder, patch encoder and backbone at the published
                                dimensions (engine_launches.py): bits of 1 row and 8, of other grids
                                and beside the layers one by one; 2,000 patches in a row; times by
                                rows and settings; clocks by kind of phase

The engine is that of the package's library; nvcc compiles the microbenchmarks, unless a library of
them is given. Each part is a process with a time limit, so a part that fails does not stop the
others; all start at once and measure one after the other. Prints while it measures and writes one
JSON file, also when parts have failed. `python -m benchmarks engine --calibration FILE` shows it
beside what the cost model predicts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies import engine_launches as study
from benchmarks.studies import engine_micro as micro
from benchmarks.studies.common import parser_of, write
from benchmarks.studies.engine_micro import Record, attempt
from mimo_fast.bench.environment import environment
from mimo_fast.bench.synthetic import preset_configs
from mimo_fast.kernels.cuda.engine_launch import Grid, library, refuses_device

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = Path(__file__).with_name("libmicro.so")
ARCHITECTURES = ("80", "90", "120")
MICRO = {"exchange": micro.exchange, "stream": micro.stream, "phases": micro.phases}
FORMATS = {"engine-int8": 8, "engine-int4": 4}
LIMITS = {"exchange": 25, "stream": 25, "phases": 20, "engine-int8": 45, "engine-int4": 45}
"""Seconds."""

PATCHES = 2000


def build(target: Path, architectures: tuple[str, ...]) -> None:
    """Compiles the microbenchmarks for these compute capabilities."""
    codes = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in architectures]
    command = ["nvcc", "-O3", "-std=c++17", "-shared", "-cudart=static", "--threads=0"]
    command += ["-Xcompiler=-fPIC", f"-I{SOURCES}", *codes, "-o", str(target)]
    subprocess.run([*command, str(SOURCES / "engine" / "micro.cu")], check=True)


def launches(record: Record, bits: int) -> None:
    device, (config, _) = torch.device("cuda"), preset_configs("7b")
    if reason := refuses_device(device):
        raise RuntimeError(reason)
    loaded = library()
    assert loaded is not None
    subject = study.Subject.random(config, bits, torch.bfloat16, device, loaded, Grid.of(device))
    measured(subject, record, bits, PATCHES)


def measured(subject: study.Subject, record: Record, bits: int, patches: int) -> None:
    """What matters most comes first: a part that runs out of time has the rest left."""
    parts: dict[str, Callable[[], Iterable[Mapping[str, Any]]]] = {
        "bits": partial(study.check_bits, subject, study.other_grids(subject.grid)),
        "soak": partial(study.check_soak, subject, patches),
        "clocks": partial(study.clocks, subject),
        "times": partial(study.times, subject, study.settings_of(subject.grid)),
    }
    for name, part in parts.items():
        attempt(record, name, partial(recorded, part, record, bits))


def recorded(part: Callable[[], Iterable[Mapping[str, Any]]], record: Record, bits: int) -> None:
    for found in part():
        record(bits=bits, **found)


def child(part: str, target: Path) -> None:
    """One part: imports first, measures when told to."""
    torch.zeros(1, device="cuda")
    print("ready", flush=True)
    sys.stdin.readline()

    def record(**values: object) -> None:
        print("RECORD " + json.dumps(values), flush=True)

    device = torch.cuda.get_device_properties(0)
    record(
        device=device.name,
        processors=device.multi_processor_count,
        l2_bytes=getattr(device, "L2_cache_size", None),
        shared_bytes=getattr(device, "shared_memory_per_block_optin", None),
    )
    if part in MICRO:
        loaded = micro.declared(ctypes.CDLL(str(target)))
        attempt(record, part, partial(MICRO[part], loaded, record))
    else:
        attempt(record, part, partial(launches, record, FORMATS[part]))


def compiled(library: Path) -> Path:
    """It, or another one where this machine does not load it."""
    if not library.exists():
        build(library, ARCHITECTURES)
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        library = Path(tempfile.mkdtemp()) / "libmicro.so"
        print(f"built here, since {error}")
        build(library, ("90",))
    return library


def shown(values: dict[str, object]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="built if it is not there")
    parser.add_argument("--build", action="store_true", help="builds the library and ends")
    parser.add_argument("--parts", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.library)
        return 0
    if arguments.build:
        build(arguments.library, ARCHITECTURES)
        return 0
    if MICRO.keys() & {*arguments.parts}:
        arguments.library = compiled(arguments.library)
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.studies.engine",
        "--library",
        str(arguments.library),
        "--child",
    ]
    children = {
        part: subprocess.Popen(
            [*command, part],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for part in arguments.parts
    }
    here = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, object] = {"environment": environment(here)}
    failed = False
    begin = time.perf_counter()
    for part, process in children.items():
        print(f"== {part}", flush=True)
        records: list[dict[str, object]] = []
        results[part] = records
        timer = threading.Timer(LIMITS[part], process.kill)
        timer.start()
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("RECORD "):
                    records.append(json.loads(line[7:]))
                    print(shown(records[-1]), flush=True)
                else:
                    print(line, end="", flush=True)
        except BrokenPipeError:
            pass
        code = process.wait()
        timer.cancel()
        failed |= code != 0 or any("failed" in each for each in records)
        print(
            f"== {part}: exit {code}, {time.perf_counter() - begin:.1f} s since the start",
            flush=True,
        )
        results[part + " exit"] = code
        write(arguments.out, results)
    print(f"written: {arguments.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
