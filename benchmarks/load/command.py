"""How many people at once: streams carried, first audio, groups a second, by number of streams.

    python -m benchmarks load -o FILE.json                        the engine with nano, 1 ... 256
    python -m benchmarks load --streams 16 48 --closed 1 4 32     some numbers of each kind
    python -m benchmarks load --compare HEAD~10 -o FILE.json      an older commit alternately
    python -m benchmarks load --server                            `mimo-fast serve` by HTTP
    python -m benchmarks load --server --profile people           dialogues over its WebSocket

`listeners` (`people.py`) hear replies in real time, each with a buffer of two seconds. A stream is
carried if it is heard 99.9% of the time; a gap is any silence within a reply. `--closed` reads as
fast as the machine goes. Every point is a process of its own and its own engine with as many slots.
The share of the ceiling is the arithmetic that groups, prompts and codec chunks need (`floor.py`)
over that of a matrix product on all cores, measured in the same run.

Where other programs take the cores, groups a second of a busy core ("a core") tell more than those
of the clock: a program of several busy threads then gets more of the machine than one of few.

`--compare` runs each point on both sides in the order A B, then B A. The other side's native
kernels are copied from here or, where csrc differs, built.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.compare import CompareError, Side, checked_out
from benchmarks.load.people import PROFILES, ROOM, carried
from benchmarks.load.work import share_of_ceiling
from mimo_fast.bench.ceiling import matmul_rate
from mimo_fast.bench.environment import ROOT, environment
from mimo_fast.bench.machine import usable_cores
from mimo_fast.checkpoint.folder import write_json

STREAMS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256)
CLOSED = (1, 4, 16, 32)

HEADS = (
    *("side", "kind", "streams", "carried", "continuity", "gaps", "worst gap"),
    *("first p50", "p95", "p99", "groups/s", "of ceiling", "cores", "a core", "memory"),
)
WIDTHS = (-8, -9, 7, 7, 10, 5, 9, 9, 8, 8, 8, 10, 5, 6, 8)

Points = list[dict[str, Any]]


def measured(side: Side, request: Mapping[str, Any], module: str) -> dict[str, Any]:
    """One point, by a process in the tree of a side.

    Raises:
        CompareError: it failed.
    """
    command = [sys.executable, "-m", f"benchmarks.load.{module}", json.dumps(request)]
    # The package of that tree, whatever is installed.
    about = os.environ | {"PYTHONPATH": str(side.root)}
    found = subprocess.run(command, cwd=side.root, env=about, capture_output=True, text=True)
    lines = found.stdout.strip().splitlines()
    if found.returncode or not lines:
        errors = found.stderr.strip().splitlines()
        why = errors[-1] if errors else f"exit code {found.returncode}"
        raise CompareError(f"cannot measure {request} on {side.name}: {why}")
    return json.loads(lines[-1])


@contextmanager
def sides(reference: str | None, built: Path | None = None) -> Iterator[list[Side]]:
    """The working tree and, before it, another commit with its native kernels.

    built: a checkout of that commit in which they are built already.
    """
    new = Side("now", ROOT)
    if reference is None:
        yield [new]
        return
    with checked_out(reference) as old:
        native(old.root, built or ROOT)
        yield [Side("before", old.root), new]


def native(tree: Path, root: Path = ROOT) -> None:
    """Gives a checkout its native kernels: ours, or its own where their source differs.

    Raises:
        CompareError: they cannot be built.
    """
    same = all(_contents(root / part) == _contents(tree / part) for part in ("csrc", "setup.py"))
    if same:
        for library in (root / "mimo_fast").glob("_native*.so"):
            shutil.copy2(library, tree / "mimo_fast" / library.name)
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    # Only the CPU's are needed here.
    about = os.environ | {"MIMO_FAST_CUDA_ARCHITECTURES": "none"}
    built = subprocess.run(command, cwd=tree, env=about, capture_output=True, text=True)
    if built.returncode or not [*(tree / "mimo_fast").glob("_native*.so")]:
        lines = (built.stderr or built.stdout).strip().splitlines()
        raise CompareError(f"cannot build the native kernels of {tree}: {lines[-1:]}")


def _contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    kept = (each for each in files if "__pycache__" not in each.parts)
    return {str(each.relative_to(path)): each.read_bytes() for each in kept}


def wanted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The points, without their sides."""
    model = {"model": args.model or "nano", "codec": args.codec or "nano"}
    shared = {"seconds": args.seconds, "ramp": args.ramp, "room": args.room, "seed": args.seed}
    shared |= {"lookahead": args.lookahead, "device": args.device} | model
    points = [{"streams": n, "profile": "closed", **shared, "ramp": 1.0} for n in args.closed]
    return points + [{"streams": n, "profile": args.profile, **shared} for n in args.streams]


def pairs(points: Points) -> list[dict[str, Any]]:
    """Of two sides: what became of each point, as ratios now / before of their medians."""
    found = []
    for name in dict.fromkeys((each["profile"], each["streams"]) for each in points):
        both = {
            side: [p for p in points if p["side"] == side and (p["profile"], p["streams"]) == name]
            for side in ("before", "now")
        }
        if not all(both.values()):
            continue
        row: dict[str, Any] = {"profile": name[0], "streams": name[1]}
        for field, path in {
            "groups_a_second": ("groups_a_second",),
            "first_audio_p95": ("first_audio", "p95"),
        }.items():
            values = {side: _median(each, path) for side, each in both.items()}
            row[field] = values
            if all(values.values()):
                row[f"{field}_ratio"] = values["now"] / values["before"]
        for field in ("gaps", "continuity"):
            row[field] = {side: [each[field] for each in members] for side, members in both.items()}
        found.append(row)
    return found


def _median(points: Points, path: Sequence[str]) -> float | None:
    values = list[float]()
    for each in points:
        value: Any = each
        for field in path:
            value = None if value is None else value[field]
        if value is not None:
            values.append(value)
    return sorted(values)[len(values) // 2] if values else None


def ratios(points: Points) -> dict[str, dict[str, float]]:
    """Groups a second of each closed loop over those of one stream, by side."""
    found: dict[str, dict[str, float]] = {}
    for side in dict.fromkeys(each["side"] for each in points):
        rates = {
            n: _median([p for p in points if _is_closed(p, side, n)], ("groups_a_second",))
            for n in sorted({p["streams"] for p in points if p["profile"] == "closed"})
        }
        if one := rates.get(1):
            found[side] = {str(n): rate / one for n, rate in rates.items() if rate}
    return found


def _is_closed(point: Mapping[str, Any], side: str, streams: int) -> bool:
    return (point["side"], point["profile"], point["streams"]) == (side, "closed", streams)


def most_carried(points: Points) -> dict[str, dict[str, int]]:
    """The most streams that were carried, and that had no gap, up to the first that were not."""
    found: dict[str, dict[str, int]] = {}
    for side in dict.fromkeys(each["side"] for each in points):
        mine = [p for p in points if p["side"] == side and p["profile"] != "closed"]
        found[side] = {
            "carried": _most(mine, carried),
            "without_gap": _most(mine, lambda p: p["gaps"] == 0 and carried(p)),
        }
    return found


def _most(points: Points, holds: Callable[[dict[str, Any]], bool]) -> int:
    most = 0
    for streams in sorted({each["streams"] for each in points}):
        if not all(holds(each) for each in points if each["streams"] == streams):
            break
        most = streams
    return most


def row(point: Mapping[str, Any]) -> list[str]:
    first = point["first_audio"] or {}
    times = [f"{1e3 * first[name]:.0f} ms" if first else "-" for name in ("p50", "p95", "p99")]
    continuity = point["continuity"]
    return [
        point["side"],
        point["profile"],
        str(point["streams"]),
        "yes" if carried(dict(point)) else "no",
        "-" if continuity is None else f"{100 * continuity:.2f}%",
        str(point["gaps"]),
        f"{1e3 * point['worst_gap']:.0f} ms",
        *times,
        f"{point['groups_a_second']:.0f}",
        f"{100 * point['of_ceiling']:.1f}%" if point.get("of_ceiling") else "-",
        f"{point['cpus']:.2f}",
        f"{point['groups_a_second'] / max(point['cpus'], 1e-9):.0f}",
        f"{point['peak_bytes'] / 1e6:.0f} MB",
    ]


def show(cells: Sequence[str]) -> None:
    padded = [
        text.ljust(-width) if width < 0 else text.rjust(width)
        for text, width in zip(cells, WIDTHS, strict=True)
    ]
    tqdm.write("  ".join(padded).rstrip(), file=sys.stdout)


def add_options(add: Callable[..., object]) -> None:
    several = {"type": int, "nargs": "*"}
    add("--streams", default=[*STREAMS], **several, help="people at once")
    add("--closed", default=[*CLOSED], **several, help="streams that read as fast as they can")
    add("--profile", default="listeners", choices=[p for p in PROFILES if p != "closed"])
    add("--seconds", type=float, default=15.0, help="of each point's window [%(default)g]")
    add("--ramp", type=float, default=4.0, help="seconds in which people arrive [%(default)g]")
    add("--room", type=float, default=ROOM, help="seconds that a listener holds [%(default)g]")
    add("--lookahead", default="elastic", choices=("elastic", "exact"))
    add("--rounds", type=int, default=1, help="of every point [%(default)s]")
    add("--compare", metavar="REF", help="another commit, alternately")
    about = "with --compare: a checkout of REF whose native kernels are built"
    add("--built", type=Path, metavar="DIR", help=about)
    add("--server", action="store_true", help="by way of `mimo-fast serve`")
    add("--device", default="cpu", help="where the model runs [%(default)s]")
    add("--model", help="directory or hub id; by default nano")
    add("--codec", help="directory or hub id")
    add("--seed", type=int, default=1)
    add("-o", "--output", type=Path, metavar="FILE.json")


def run(args: argparse.Namespace) -> int:
    if bool(args.model) != bool(args.codec):
        raise ValueError("--model and --codec go together")
    if min([*args.streams, *args.closed, args.rounds, 1]) < 1 or args.seconds <= 0:
        raise ValueError("streams and rounds must be at least 1, and seconds more than 0")
    if args.server and args.closed:
        args.closed = []
    # The other commit's worktree must be removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rate = matmul_rate(device, dtype)
    record: dict[str, Any] = {
        "kind": "load",
        "environment": environment(device),
        "cores": usable_cores(),
        "matmul_flop_a_second": rate,
        "compared_with": args.compare,
        "points": [],
    }
    points: Points = record["points"]
    module = "server" if args.server else "engine"
    show(HEADS)
    shares = share_of_ceiling(args.model or "nano", args.codec or "nano", rate, args.device)
    with sides(args.compare, args.built) as chosen:
        record["sides"] = [side.name for side in chosen]
        for turn in range(args.rounds):
            order = chosen if turn % 2 == 0 else chosen[::-1]
            for request in wanted(args):
                for side in order:
                    point = {"side": side.name, "target": module}
                    point |= measured(side, request, module)
                    if module == "engine":
                        # Over the wire neither words nor prompts are seen.
                        point |= shares(point)
                    points.append(point)
                    show(row(point))
                    _keep(args.output, record)
    return 0


def _keep(output: Path | None, record: dict[str, Any]) -> None:
    points = record["points"]
    record["most"] = most_carried(points)
    record["of_one_stream"] = ratios(points)
    if record["compared_with"]:
        record["pairs"] = pairs(points)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, record)
