"""`make bench`: measures a CPU in ten minutes on two cores, into one dated file, and reports.

    python -m benchmarks suite      benchmarks/results/DATE-cpu.jsonl, docs/performance.md
    python -m benchmarks suite --budget 1200 --only ops

Each part is a process, so its memory is freed and it can be ended. A part starts if its time on two
quiet cores is left of the budget, and ends with the budget at the latest. Parts that do not fit are
skipped by name; the rows of a part that was ended are kept.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic

from benchmarks.records import RESULTS, JsonLines
from benchmarks.report import write_report
from mimo_fast.bench.environment import ROOT

BUDGET = 570.0
"""Seconds for all parts; the report takes some more."""

GRACE = 20.0
"""Seconds that an interrupted part has before it is killed.

A large product cannot be interrupted.
"""


@dataclass(frozen=True)
class Part:
    """A command of `python -m benchmarks`, or `mimo-fast bench`.

    seconds: about what it takes on two quiet cores.
    """

    name: str
    seconds: float
    command: str


QUICK, LOAD = "quick", "load"
PEOPLE = "load --streams 1 4 16 --closed 1 16 --seconds 4 --ramp 1"
GROUPS = "e2e --preset 7b --batch 1 --groups 8 --words 4 --patches 12 --quantization "
TINY = "e2e --preset tiny --dtype float32 --quantization bf16 --batch 1 4 --context 256 2048"
PARTS = (
    Part("tiny", 25, f"{TINY} --groups 12 --patches 16"),
    Part("7b int4", 100, f"{GROUPS} int4 --context 64 256 --task tts"),
    Part("7b int8", 90, f"{GROUPS} int8 --context 64 --task tts"),
    Part("ops", 120, "ops --quick"),
    # Dense prompts are slow where the CPU has no bfloat16 instructions, so there is no request.
    Part("7b bf16", 100, f"{GROUPS} bf16 --context 64 --task --no-codec"),
    Part(QUICK, 60, "bench --quantization int4"),
    # Nano, and as many people at once as it carries.
    Part(LOAD, 50, PEOPLE),
)
"""All parts, the most informative first."""

Start = Callable[[Part, Path], "subprocess.Popen[bytes]"]
"""Starts a part's process, which appends to a file or, for one record alone, writes it."""


def start(part: Part, output: Path) -> subprocess.Popen[bytes]:
    program, result = ("mimo_fast", "--json") if part.name == QUICK else ("benchmarks", "-o")
    command = [program, *part.command.split(), "--device", "cpu", result, str(output)]
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT)


def run_part(part: Part, output: Path, seconds: float, start: Start = start) -> str | None:
    """Runs a part for at most so long; returns what was wrong, or None.

    A part is interrupted as Ctrl-C does, then killed if it does not end.

    Raises:
        KeyboardInterrupt: once the part has ended as well.
    """
    with tempfile.TemporaryDirectory(prefix="mimo-fast-bench-") as folder:
        single = Path(folder) / "quick.json"
        process = start(part, single if part.name in (QUICK, LOAD) else output)
        try:
            code = process.wait(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as ended:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if isinstance(ended, KeyboardInterrupt):
                raise
            return f"ended after {seconds:.0f} s, with the time for all; its records are kept"
        if single.exists():
            JsonLines(output).append(json.loads(single.read_text(encoding="utf-8")))
    return f"exit code {code}" if code else None


def run_parts(
    parts: Sequence[Part],
    output: Path,
    budget: float,
    clock: Callable[[], float] = monotonic,
    start: Start = start,
) -> dict[str, str]:
    """Name of a part -> why it is missing or incomplete."""
    began, amiss = clock(), {}
    for part in parts:
        left = budget - GRACE - (clock() - began)
        about = f"about {part.seconds:.0f} s"
        if part.seconds > left:
            amiss[part.name] = f"it takes {about}, and {max(left, 0):.0f} s are left"
            record = {"kind": "skipped", "name": part.name, "reason": amiss[part.name]}
            JsonLines(output).append(record)
            continue
        print(f"\n{part.name}: {about} on two cores, {left:.0f} s left", flush=True)
        if (wrong := run_part(part, output, left, start)) is not None:
            amiss[part.name] = wrong
    return amiss


def add_options(add: Callable[..., object]) -> None:
    names = f"of {', '.join(part.name for part in PARTS)}"
    where = "append to this [benchmarks/results/DATE-cpu.jsonl]"
    add("--budget", type=float, default=BUDGET, help="seconds for all parts [%(default)g]")
    add("--only", nargs="+", default=["*"], metavar="GLOB", help=names)
    add("--no-report", action="store_true", help="leave docs/performance.md as it is")
    add("-o", "--output", type=Path, metavar="FILE.jsonl", help=where)


def run(args: argparse.Namespace) -> int:
    output = args.output or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-cpu.jsonl"
    parts = [part for part in PARTS if any(fnmatch(part.name, glob) for glob in args.only)]
    if not parts:
        there = ", ".join(part.name for part in PARTS)
        raise ValueError(f"no part matches {args.only}; there are {there}")
    code = 0
    try:
        amiss = run_parts(parts, output, args.budget)
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", file=sys.stderr)
        amiss, code = {}, 130
    for name, reason in amiss.items():
        print(f"{name}: {reason}")
        code = code or (1 if reason.startswith("exit code") else 0)
    print(f"results: {output if output.exists() else 'none'}", flush=True)
    if args.no_report or not output.exists():
        return code
    return write_report() or code
