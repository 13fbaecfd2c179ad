"""Is the working tree faster than another commit? Both are timed alternately, op by op.

    python -m benchmarks --compare HEAD~1 --op '*.qkv'

The other commit is checked out into a temporary git worktree. The measuring code is the same on
both sides: benchmarks/ and mimo_fast/bench of the working tree replace the other's, so that older
commits can be measured too, as long as their kernels have the functions that today's cases call.

Each round starts one process a side, since the placement of a process in memory can change times by
some percent, and times every op in the order A B B A or B A A B, so that drift affects both sides
alike. Each pair of neighbours gives a ratio; the verdict on an op is that of the median ratio and
its confidence interval.

A process is this file with a JSON argument, started in the tree of its version. Requests and
answers are JSON, one a line, on standard input and output:

    at the start                 -> {"cases": [names], "missing": {op: why}}
    {"case": name, "seconds": s} -> {"seconds": median} or {"refused": why}
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.columns import COLUMNS, Table
from benchmarks.harness import MIN_RUNS, Benchmark, Provider, Refused, prepare
from benchmarks.ops import add_case_options, select
from benchmarks.records import JsonLines
from mimo_fast.bench.environment import ROOT, environment
from mimo_fast.bench.timing import time_calls

OVERLAID = ("benchmarks", "mimo_fast/bench")
PIPES = {"text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
ORDERS = ("ABBA", "BAAB")
ROUNDS = 8
SECONDS = 0.1
CONFIDENCE = 0.99
"""Confidence level; many ops are compared, and at 95% every twentieth would seem to differ."""

RESAMPLES = 5000


class CompareError(ValueError):
    """Two versions cannot be compared; the message is one line."""


@dataclass(frozen=True)
class Comparison:
    """Median over pairs of new time / old time, and its confidence interval."""

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """The verdict of the interval; none while it contains 1."""
        if self.low > 1:
            return "slower"
        return "faster" if self.high < 1 else "no difference shown"


def compared(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Comparison:
    """Compares (old, new) seconds; each pair was measured one right after the other.

    The interval is a percentile bootstrap over pairs. Whatever the machine does to both times of a
    pair cancels in their ratio; a median is robust to what it does to one of them.

    Raises:
        ValueError: there are no pairs, or a time is not positive.
    """
    if not pairs or min(min(pair) for pair in pairs) <= 0:
        raise ValueError("a comparison needs pairs of positive times")
    ratios = np.log([new / old for old, new in pairs])
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Comparison(*(float(np.exp(x)) for x in (np.median(ratios), low, high)), len(ratios))


@dataclass(frozen=True)
class Side:
    """A version: its name, and the tree in which its process runs."""

    name: str
    root: Path


class Worker:
    """A process that times benchmarks of one side."""

    def __init__(self, side: Side, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._side, self._process, self._errors = side, process, errors

    def answer(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request; the first is not asked for.

        Raises:
            CompareError: the result of the op is wrong, or the process has died.
        """
        if request is not None:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if line := self._process.stdout.readline():
            answer = json.loads(line)
            if "refused" in answer:
                wrong = f"{request['case']} is wrong in {self._side.name}"
                raise CompareError(f"{wrong}: {answer['refused']}")
            return answer
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        why = lines[-1] if lines else f"exit code {self._process.returncode}"
        raise CompareError(f"cannot measure {self._side.name} with this suite: {why}")


@contextmanager
def started(side: Side, arguments: dict[str, Any]) -> Iterator[Worker]:
    """A worker in the tree of a side, ended afterwards."""
    command = [sys.executable, "-m", "benchmarks.compare", json.dumps(arguments)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(command, cwd=side.root, stderr=errors, **PIPES) as process,
    ):
        try:
            yield Worker(side, process, errors)
        finally:
            process.kill()


@contextmanager
def checked_out(reference: str, root: Path = ROOT) -> Iterator[Side]:
    """A temporary worktree of a commit under today's measuring code; always removed afterwards.

    Raises:
        CompareError: there is no such commit here, or no git checkout.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)

    found = git("rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}")
    if found.returncode:
        advice = "try HEAD~1, a branch, a tag or a hash"
        raise CompareError(f"{reference} names no commit of {root}; {advice}")
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="mimo-fast-compare-") as temporary:
        tree = Path(temporary) / "tree"
        added = git("worktree", "add", "--detach", str(tree), commit)
        try:
            if added.returncode:
                why = added.stderr.strip().splitlines()[-1]
                raise CompareError(f"git cannot check out {reference}: {why}")
            ignored = shutil.ignore_patterns("__pycache__", "results")
            for part in OVERLAID:
                shutil.rmtree(tree / part, ignore_errors=True)
                shutil.copytree(root / part, tree / part, ignore=ignored)
            yield Side(f"{reference} ({commit[:10]})", tree)
        finally:
            git("worktree", "remove", "--force", str(tree))
            git("worktree", "prune")


def paired_times(
    old: Side, new: Side, arguments: dict[str, Any], rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[str, list[tuple[float, float]]]:
    """(old, new) seconds of every benchmark that both sides have, two pairs a round.

    Raises:
        CompareError: one side cannot be measured, or a result is wrong.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for turn in tqdm(range(rounds), unit="round", disable=None, leave=False):
        with ExitStack() as stack:
            sides = {"A": old, "B": new}
            workers = {x: stack.enter_context(started(sides[x], arguments)) for x in "AB"}
            ready = {x: workers[x].answer() for x in "AB"}
            for x, side in sides.items() if not turn else ():
                for family, why in ready[x]["missing"].items():
                    tqdm.write(f"not compared: {family}: {side.name} is too old: {why}")
            both = [case for case in ready["B"]["cases"] if case in ready["A"]["cases"]]
            if not both:
                names = f"{old.name} and {new.name}"
                raise CompareError(f"{names} have none of the chosen ops in common")
            for case in both:
                request = {"case": case, "seconds": seconds}
                order = ORDERS[turn % 2]
                times = [(x, workers[x].answer(request)["seconds"]) for x in order]
                each = (dict(times[:2]), dict(times[2:]))
                pairs.setdefault(case, []).extend((pair["A"], pair["B"]) for pair in each)
    return pairs


def run_compare(
    reference: str,
    arguments: dict[str, Any],
    output: JsonLines,
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    root: Path = ROOT,
) -> dict[str, Comparison]:
    """Compares the working tree with a commit: a line and a record for each op.

    arguments: of the benchmarks, as `answer` takes them.
    """
    new, orders = Side("the working tree", root), " or ".join(ORDERS)
    with checked_out(reference, root) as old:
        print(f"old: {old.name}; new: {new.name}; {rounds} rounds of {orders}", flush=True)
        pairs = paired_times(old, new, arguments, rounds, seconds)
    table, found = Table(COLUMNS["compare"]), {}
    about = environment(arguments["device"], root=root)
    for case, times in pairs.items():
        found[case] = compared(times)
        record = {
            "kind": "compare",
            "case": case,
            "old": old.name,
            "new": new.name,
            **vars(found[case]),
            "verdict": found[case].verdict,
            "seconds": times,
            "environment": about,
        }
        table.row(record)
        output.append(record)
    return found


def add_options(add: Callable[..., object]) -> None:
    add("reference", metavar="REF", help="the other commit, such as HEAD~1")
    add_case_options(add)
    add("--rounds", type=int, default=ROUNDS, help="each has two pairs [%(default)s]")
    add("--seconds", type=float, default=SECONDS, help="of each measurement [%(default)s]")


def run(args: argparse.Namespace) -> int:
    wanted = {name: getattr(args, name) for name in ("op", "format", "m", "device")}
    wanted |= {"quick": args.m is None, "threads": args.threads or torch.get_num_threads()}
    # Unknown ops are bad usage, and known before anything is checked out.
    select(args.op, args.m, args.format)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, not {args.rounds}")
    # The worktree must be removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    output, options = JsonLines(args.output), {"rounds": args.rounds, "seconds": args.seconds}
    run_compare(args.reference, wanted, output, **options)
    return 0


def own_benchmarks(
    arguments: dict[str, Any], device: torch.device, missing: dict[str, str]
) -> dict[str, tuple[Benchmark, Provider]]:
    """Our own providers that run on the device, by "op format shape".

    missing: see `ops.all_benchmarks`.
    """
    wanted = (arguments[name] for name in ("op", "m", "format"))
    try:
        found = select(*wanted, quick=arguments["quick"], missing=missing)
    except ValueError:
        # The other side has some; otherwise there was an error before.
        return {}
    return {
        benchmark.title: (benchmark, provider)
        for benchmark in found
        for provider in benchmark.providers
        if provider.name.startswith("ours-") and provider.missing(device) is None
    }


@torch.no_grad()
def answer() -> None:
    """Serves one side's requests."""
    arguments = json.loads(sys.argv[1])
    # Other output must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(arguments["threads"])
    device = torch.device(arguments["device"])
    missing: dict[str, str] = {}
    cases = own_benchmarks(arguments, device, missing)
    answers.write(json.dumps({"cases": list(cases), "missing": missing}) + "\n")
    name, calls = "", list[Callable[[], object]]()
    for line in sys.stdin:
        request = json.loads(line)
        if request["case"] != name:
            # Two large ones might not fit into memory.
            name, calls = "", []
            benchmark, provider = cases[request["case"]]
            try:
                calls, _ = prepare(benchmark, provider, benchmark.make(device), device)
            except Refused as refused:
                answers.write(json.dumps({"refused": str(refused)}) + "\n")
                continue
            name = request["case"]
        time = time_calls(calls, device, seconds=request["seconds"], min_runs=MIN_RUNS)
        answers.write(json.dumps({"seconds": time.p50}) + "\n")


if __name__ == "__main__":
    answer()
