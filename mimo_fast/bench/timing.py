"""Duration of a call, on a CPU or a CUDA device.

CPU: a monotonic clock around each call, after a warm-up. CUDA: the calls are captured into a graph
and its replays are timed with events, so the host's launch cost does not count, as in the runtime;
calls that cannot be captured are timed one by one. Several calls alternate over copies of the same
inputs, so that a cache does not serve what a model would read from memory; `copies_for` tells how
many copies that takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

import torch

Call = Callable[[], object]

GRAPH_SECONDS = 2e-3
"""Least seconds of one replay; events resolve about half a microsecond."""

MAX_COPIES = 64


@dataclass(frozen=True)
class CallTime:
    """Seconds of one call: the 10th, 50th and 90th percentile of n measurements."""

    p10: float
    p50: float
    p90: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> CallTime:
        """From measured durations, at least one; percentiles are interpolated linearly."""
        p10, p50, p90 = (percentile(seconds, share) for share in (0.1, 0.5, 0.9))
        return cls(p10, p50, p90, len(seconds))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share (0 ... 1) of `values` lies, interpolated linearly.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def time_calls(
    calls: Call | Sequence[Call],
    device: torch.device | str,
    *,
    seconds: float = 0.5,
    min_runs: int = 5,
    max_runs: int = 1000,
) -> CallTime:
    """Times one call, or several that do the same on copies of their inputs, alternately.

    Args:
        calls: without arguments; their results are dropped.
        device: where they run; a call on a CPU must return after its work.
        seconds: bound on the measuring without warm-up, unless `min_runs` calls take longer.
        min_runs, max_runs: least and largest number of measurements.
    """
    return CallTime.of(
        durations(calls, device, seconds=seconds, min_runs=min_runs, max_runs=max_runs)
    )


def durations(
    calls: Call | Sequence[Call],
    device: torch.device | str,
    *,
    seconds: float,
    min_runs: int,
    max_runs: int,
) -> list[float]:
    """The measurements that `time_calls` summarizes, in seconds."""
    turns = [calls] if callable(calls) else list(calls)
    if torch.device(device).type == "cuda":
        return _time_cuda(turns, seconds, min_runs, max_runs)
    for call in turns:
        call()
    return _repeat(lambda i: _clocked(turns[i % len(turns)]), seconds, min_runs, max_runs)


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has finished all work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last-level cache; 32 MB for a CPU that does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [path.read_text(encoding="utf-8").strip() for path in files]
    units = {"K": 2**10, "M": 2**20}
    sizes = [int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units]
    return max(sizes, default=2**25)


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of so many bytes exceed the cache.

    At most 64: smaller inputs are in the cache in a model as well, where the op before wrote them.
    """
    return max(1, min(MAX_COPIES, -(-2 * cache_bytes(device) // max(1, nbytes))))


def _clocked(call: Call) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def _repeat(
    measure: Callable[[int], float], seconds: float, min_runs: int, max_runs: int
) -> list[float]:
    times: list[float] = []
    began = perf_counter()
    while len(times) < max_runs and (len(times) < min_runs or perf_counter() - began < seconds):
        times.append(measure(len(times)))
    return times


def _time_cuda(turns: list[Call], seconds: float, min_runs: int, max_runs: int) -> list[float]:
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    # Kernels are compiled and libraries set up outside the capture, which forbids both.
    with torch.cuda.stream(warm):
        for call in [*turns, *turns]:
            call()
    torch.cuda.current_stream().wait_stream(warm)
    single = max(_between_events(turns[0]), 1e-7)
    # Whole rounds, so that every copy counts alike.
    rounds = max(1, math.ceil(GRAPH_SECONDS / (single * len(turns))))
    replay = _captured(turns * rounds)
    if replay is None:
        return _repeat(
            lambda i: _between_events(turns[i % len(turns)]), seconds, min_runs, max_runs
        )
    replay()
    count = len(turns) * rounds
    return _repeat(lambda _: _between_events(replay) / count, seconds, min_runs, max_runs)


def _captured(calls: list[Call]) -> Call | None:
    """A replay of all calls, or None where one does what a capture forbids.

    Reading from the device is an example.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _between_events(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
