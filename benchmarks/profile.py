"""The time of an audio group, kernel by kernel: backbone step, patch decoder, patch encoder.

    python -m benchmarks profile --preset 7b --quantization int4 \\
        -o benchmarks/results/DATE-profile.jsonl

On a GPU a row is a CUDA kernel, and the group runs twice: from captured graphs and, named "eager",
kernel by kernel. On a CPU a row is a torch op; native kernels and Python are the row "outside
torch". Counts and times are means over the profiled groups; a group's own seconds are measured
without the profiler.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.columns import Column, Table, duration, share, shown
from benchmarks.records import JsonLines, add_run_options, machine_fields
from mimo_fast.bench.ceiling import ceiling, name_of
from mimo_fast.bench.floor import GroupWork
from mimo_fast.bench.groups import SETTLING, prompted, start_rows, take_group, time_groups
from mimo_fast.bench.machine import useful_threads
from mimo_fast.bench.target import Target
from mimo_fast.bench.timing import CallTime, synchronize
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.loading import default_device, parse_dtype

SYNCHRONIZING = re.compile(r"cu(da)?(Stream|Event|Device|Ctx)Synchronize|cudaMemcpy")
"""CUDA calls in which the host waits for the device."""

LAUNCHING = re.compile(r"cu(da)?LaunchKernel(Ex|ExC)?|cudaGraphLaunch|cudaMem(cpy|set)Async")
"""CUDA calls that launch work."""

GROUPS = "audio groups"
"""Name of the range of the trace that counts."""

OUTSIDE = "outside torch"

NAME_WIDTH = 48
COLUMNS: tuple[Column, ...] = (
    ("kernel", "name", lambda name: name[:NAME_WIDTH]),
    ("count", "count", "{:g}".format),
    ("time", "seconds", duration),
    ("share", "share", share),
    ("MB", "bytes", partial(shown, scale=1e-6)),
    ("GB/s", "rate", partial(shown, scale=1e-9, digits=0)),
)


@dataclass(frozen=True)
class Kernel:
    """Launches and seconds of one kernel (on a CPU, one torch op) in a group.

    Bytes are given where shapes tell them.
    """

    name: str
    count: float
    seconds: float
    bytes: int | None = None


@dataclass(frozen=True)
class Trace:
    """One audio group of all rows.

    kernels: the most expensive first; time outside all of them has no row. launches, host_syncs:
    the host's calls a group.
    """

    mode: str
    kernels: tuple[Kernel, ...]
    launches: dict[str, float]
    host_syncs: dict[str, float]

    @property
    def count(self) -> float:
        """Number of kernels of a group."""
        return sum(kernel.count for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        """Seconds of the kernels, one after the other."""
        return sum(kernel.seconds for kernel in self.kernels)


def trace_groups(replies: list[Reply], groups: int, device: torch.device, mode: str) -> Trace:
    """Takes groups of replies in step; the first SETTLING are not counted."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    for _ in range(SETTLING):
        take_group(replies)
    # Work that is still running belongs to an earlier group, and a garbage collection to none.
    synchronize(device)
    gc.collect()
    gc.disable()
    try:
        with profile(activities=activities) as profiler, record_function(GROUPS):
            for _ in range(groups):
                take_group(replies)
    finally:
        gc.enable()
    for reply in replies:
        reply.close()
    return summarize(profiler.events(), groups, device, mode)


def summarize(events: Iterable[Any], groups: int, device: torch.device, mode: str) -> Trace:
    """Makes a trace from the profiler's events, which are in microseconds."""
    events = list(events)
    marks = (e for e in events if e.name == GROUPS and e.device_type == DeviceType.CPU)
    (window,) = (mark.time_range for mark in marks)
    own = [e for e in events if e.name != GROUPS]
    host = [
        e
        for e in own
        if e.device_type == DeviceType.CPU
        and window.start <= e.time_range.start
        and e.time_range.end <= window.end
    ]
    calls = Counter(e.name for e in host)
    launches, waits = (
        {name: count / groups for name, count in calls.items() if pattern.fullmatch(name)}
        for pattern in (LAUNCHING, SYNCHRONIZING)
    )
    pairs = [(e.name, e.self_cpu_time_total) for e in host]
    if device.type == "cuda":
        # Kernels end after the host has left the window, which the device's side of the trace has
        # by its name too.
        on_device = (e for e in own if e.device_type == DeviceType.CUDA)
        pairs = [(e.name, e.time_range.elapsed_us()) for e in on_device]
    count, microseconds = Counter[str](), Counter[str]()
    for name, time in pairs:
        count[name] += 1
        microseconds[name] += time
    if device.type == "cpu":
        microseconds[OUTSIDE] = window.elapsed_us() - microseconds.total()
    kernels = (
        Kernel(name, count[name] / groups, spent / groups / 1e6)
        for name, spent in microseconds.most_common()
    )
    return Trace(mode, tuple(kernels), launches, waits)


def with_bytes(trace: Trace, target: Target, work: GroupWork) -> Trace:
    """Adds the bytes that a kernel reads, where shapes tell them.

    They do for a kernel that reads the whole cache, all code heads, or all weights. The latter are
    known where one kernel does every product, as for a row in a quantized format or one dense row.
    """
    read = work.audio.bytes
    heads = target.lm.code_heads.nbytes * target.lm.config.group_size
    known = {"split_attention_kernel": read["cache"], "head_logits_kernel": heads}
    names = [kernel.name for kernel in trace.kernels]
    products = [name for name in names if "gemv" in name or "dot_kernel" in name]
    if len(products) == 1:
        known[products[0]] = sum(read.values()) - read["cache"] - heads
    told = tuple(replace(kernel, bytes=known.get(kernel.name)) for kernel in trace.kernels)
    return replace(trace, kernels=told)


def profile_target(args: argparse.Namespace, target: Target, output: JsonLines) -> None:
    """Measures and profiles a group in each mode, prints the tables and writes the records."""
    device, machine = target.lm.device, ceiling(target.lm.device)
    prompt = args.context - args.groups - SETTLING
    work = GroupWork.of(target.lm, args.batch, prompt, args.groups)
    print(f"{machine}\n{work.describe(machine)}", flush=True)
    context, _ = prompted(target, prompt)
    captured = target.engine.decoder.graphs
    for mode in ("graph", "eager") if captured else ("eager",):
        target.engine.decoder.graphs = captured if mode == "graph" else None
        measured = time_groups(target, args.batch, prompt, args.groups).audio
        taken = args.groups + SETTLING
        replies = start_rows(target, context, args.batch, target.lm.empty_id, taken)
        trace = with_bytes(trace_groups(replies, args.groups, device, mode), target, work)
        show(trace, measured, args.top)
        record = {
            "kind": "profile",
            "model": args.preset,
            "random_weights": True,
            "quantization": args.quantization,
            "dtype": name_of(target.lm.dtype),
            "mode": mode,
            "batch": args.batch,
            "prompt_groups": prompt,
            "groups": args.groups,
            "unit": "CUDA kernel" if device.type == "cuda" else "torch op",
            "kernels_a_group": trace.count,
            "kernel_seconds": trace.seconds,
            "audio_group": vars(measured),
            "host_syncs": trace.host_syncs,
            "launches": trace.launches,
            "bytes": work.audio.bytes,
            "cached_bytes": work.audio.cached,
            "floor": work.floors(machine)[2],
            "kernels": [asdict(kernel) for kernel in trace.kernels],
        }
        output.append(record | machine_fields(machine, device))


def show(trace: Trace, measured: CallTime, top: int) -> None:
    launches, syncs = (sum(calls.values()) for calls in (trace.launches, trace.host_syncs))
    print(
        f"{trace.mode}: an audio group takes {duration(measured.p50)}; {trace.count:.0f} kernels "
        f"of {duration(trace.seconds)} in all; the host makes {launches:.0f} launches and waits "
        f"{syncs:g} times"
    )
    rows, rest = list(trace.kernels[:top]), trace.kernels[top:]
    if rest:
        sums = (sum(k.count for k in rest), sum(k.seconds for k in rest))
        rows.append(Kernel(f"{len(rest)} others", *sums))
    table = Table(COLUMNS)
    for kernel in rows:
        known = kernel.bytes is not None and kernel.seconds > 0
        rate = kernel.bytes / kernel.seconds if known else None
        table.row(vars(kernel) | {"share": kernel.seconds / trace.seconds, "rate": rate})


def add_options(add: Callable[..., object]) -> None:
    formats = {"choices": ("bf16", "int8", "int4", "nf4"), "metavar": "FORMAT"}
    add("--preset", default="7b", choices=("tiny", "7b"))
    about = "bf16 (as --dtype), int8, int4 or nf4 [%(default)s]"
    add("--quantization", default="int4", help=about, **formats)
    add("--dtype", default="bfloat16", help="of activations and dense weights")
    add("--batch", type=int, default=1)
    add("--context", type=int, default=1024, help="groups, with those that are decoded")
    add("--groups", type=int, default=8, help="profiled")
    add("--top", type=int, default=25, help="rows of the table; the record has all")
    add_run_options(add, each="mode")


def run(args: argparse.Namespace) -> int:
    if min(args.batch, args.groups, args.top) < 1:
        raise ValueError("--batch, --groups and --top must be at least 1")
    decoded = args.groups + SETTLING
    if args.context <= decoded:
        raise ValueError(f"--context must be above {decoded}, the groups that are decoded")
    device, dtype = torch.device(args.device or default_device()), parse_dtype(args.dtype)
    assert dtype is not None
    quantization = None if args.quantization == "bf16" else args.quantization
    target = Target.random(args.preset, quantization, dtype, device, with_codec=False)
    torch.set_num_threads(args.threads or useful_threads(target.lm.config))
    profile_target(args, target.sized(args.batch, args.context), JsonLines(args.output))
    return 0
